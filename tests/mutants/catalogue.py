"""The planted defects, by room: (what is wrong, the code, the defect, the test that must fail)."""

from tests.mutants.ctm import CTM
from tests.mutants.data import PICTURES
from tests.mutants.diagnosis import DIAGNOSIS
from tests.mutants.dmd import DMD, PAIRS
from tests.mutants.dmd2 import DMD2
from tests.mutants.export import EXPORTS, PUBLISHED
from tests.mutants.families import FAMILIES
from tests.mutants.feedback import FEEDBACK
from tests.mutants.hyper import HYPER
from tests.mutants.ladd import LADD
from tests.mutants.lightning import LIGHTNING
from tests.mutants.mutant import Mutant, planted
from tests.mutants.pcm import DISCRIMINATORS, PCM
from tests.mutants.plan import EIGHT_BITS, OPTIMIZERS, PLAN
from tests.mutants.program import BENCHMARK, PROCESSES, STAGES
from tests.mutants.turbo import AUGMENT, HELPERS, INPUTS, PROJECTION, TURBO
from tests.mutants.use import USE

SCHEDULE = planted(
    "diffusion/schedule.py",
    "diffusion/test_schedule.py",
    (
        "schedule: alpha and sigma are swapped",
        "alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)",
        "alpha, sigma = np.sqrt(1 - bar), np.sqrt(bar)",
        "test_stable_diffusion_table",
    ),
    (
        "schedule: sigma lacks its square root",
        "alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)",
        "alpha, sigma = np.sqrt(bar), 1 - bar",
        "test_stable_diffusion_table",
    ),
    (
        "schedule: scaled_linear is linear in beta, not in its root",
        "root = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_train_timesteps)",
        "root = np.sqrt(np.linspace(beta_start, beta_end, num_train_timesteps))",
        "test_stable_diffusion_figures",
    ),
    (
        "schedule: zero terminal SNR shifts the table but does not scale it back",
        "root = (root - root[-1]) * root[0] / (root[0] - root[-1])",
        "root = root - root[-1]",
        "test_zero_terminal_snr_table",
    ),
    (
        "schedule: table index 0 counts as clean data",
        "clean = time == self.clean",
        "clean = time <= 0 if self.family == 'vp' else time == self.clean",
        "test_clean_is_clean_and_index_zero_is_not[sd]",
    ),
    (
        "schedule: between indices sigma/alpha is linear, not its logarithm",
        "np.exp(np.log(below) * (1 - fraction) + np.log(above) * fraction)",
        "below * (1 - fraction) + above * fraction * 1.0",
        "test_between_indices_log_sigma_is_linear",
    ),
    (
        "schedule: between indices the neighbours change places",
        "np.exp(np.log(below) * (1 - fraction) + np.log(above) * fraction)",
        "np.exp(np.log(below) * fraction + np.log(above) * (1 - fraction))",
        "test_between_indices_log_sigma_is_linear",
    ),
    (
        "schedule: an EulerDiscrete config's linear interpolation is ignored",
        'schedule.interpolation = "sigma"',
        'schedule.interpolation = "log_sigma"',
        "test_an_euler_config_interpolates_sigma_itself",
    ),
    (
        "schedule: noise is added in half precision",
        "x0, eps = working(x0), working(eps)",
        "",
        "test_add_noise",
    ),
    (
        "schedule: trailing timesteps are one too low",
        "[:n].astype(np.int64) - 1",
        "[:n].astype(np.int64) - 2",
        "test_timesteps_as_figures",
    ),
    (
        "schedule: trailing timesteps are rounded down",
        "np.round(np.arange(total, 0, -total / n))",
        "np.floor(np.arange(total, 0, -total / n))",
        "test_vp_timesteps_are_diffusers[7-trailing]",
    ),
    (
        "schedule: leading timesteps forget steps_offset",
        "np.arange(n)[::-1] * (total // n) + offset",
        "np.arange(n)[::-1] * (total // n)",
        "test_timesteps_as_figures",
    ),
    (
        "schedule: the LCM grid spreads to the last index",
        "np.floor(np.linspace(0, len(origin), n, endpoint=False))",
        "np.floor(np.linspace(0, len(origin) - 1, n))",
        "test_lcm_grids[lcm-4]",
    ),
    (
        "schedule: the LCM grid rounds up",
        "np.floor(np.linspace(0, len(origin), n, endpoint=False))",
        "np.ceil(np.linspace(0, len(origin), n, endpoint=False))",
        "test_lcm_grids[lcm-4]",
    ),
    (
        "schedule: the training grid is one timestep too low",
        "return np.concatenate([[0.0], self.timesteps(n).numpy()[::-1].astype(np.float64)])",
        "return np.concatenate([[0.0], self.timesteps(n).numpy()[::-1].astype(np.float64) - 1])",
        "test_training_grids",
    ),
    (
        "schedule: the training grid ends at clean data, not at index 0",
        "return np.concatenate([[0.0], self.timesteps(n).numpy()[::-1].astype(np.float64)])",
        "return np.concatenate([[-1.0], self.timesteps(n).numpy()[::-1].astype(np.float64)])",
        "test_training_grids",
    ),
    (
        "schedule: phase edges are rounded up",
        "first = np.floor(np.linspace(0, num_steps, num_phases, endpoint=False))",
        "first = np.ceil(np.linspace(0, num_steps, num_phases, endpoint=False))",
        "test_phase_edges",
    ),
    (
        "schedule: the lowest Karras level is left to rounding",
        "grid[-1] = low",
        "pass",
        "test_training_grids",
    ),
    (
        "schedule: Karras levels ignore the rho they are given",
        "rho = self.rho if rho is None else rho",
        "rho = self.rho",
        "test_karras_grid",
    ),
    (
        "schedule: shift bends towards data",
        "self.shift * t / (1 + (self.shift - 1) * t)",
        "t / (self.shift - (self.shift - 1) * t)",
        "test_shift_scales_the_noise_ratio",
    ),
    (
        "schedule: the time of no noise at all is index 0, not clean data",
        "np.where(eta == 0, self.clean, time)",
        "time",
        "test_time_at_of_other_families",
    ),
    (
        "schedule: a dynamically shifted config keeps its static shift",
        'shift = 1.0 if config.get("use_dynamic_shifting") else float(shift or 1.0)',
        "shift = float(shift or 1.0)",
        "test_from_diffusers_flow",
    ),
)

PREDICTION = planted(
    "diffusion/prediction.py",
    "diffusion/test_prediction.py",
    (
        "prediction: v has the other sign",
        '"v_prediction": (-sigma, alpha)',
        '"v_prediction": (sigma, -alpha)',
        "test_jump_is_alpha_x0_plus_sigma_eps",
    ),
    (
        "prediction: flow is x0 - eps",
        '"flow": (-one, one)',
        '"flow": (one, -one)',
        "test_jump_is_alpha_x0_plus_sigma_eps",
    ),
    (
        "prediction: the determinant's sign",
        "determinant = self._alpha * self._q - self._sigma * self._p",
        "determinant = self._alpha * self._q + self._sigma * self._p",
        "test_jump_is_alpha_x0_plus_sigma_eps",
    ),
    (
        "prediction: v's determinant is taken as 1, right for VP alone",
        "determinant = self._alpha * self._q - self._sigma * self._p",
        "determinant = self._alpha * self._q - self._sigma * self._p\n"
        '        determinant = np.ones_like(determinant) if self.prediction_type == "v_prediction" else determinant',
        "test_general_v_with_alpha_squared_plus_sigma_squared_not_one",
    ),
    (
        "prediction: rows that stay where they are get computed, not kept",
        "return torch.where(mask.to(self.x.device, non_blocking=True), self.x, jump)",
        "return jump",
        "test_pure_noise_and_epsilon",
    ),
    (
        "prediction: one row that stays keeps all of them",
        "if still.all():",
        "if still.any():",
        "test_jump_to_the_own_time_is_the_state_bit_for_bit",
    ),
    (
        "prediction: conversion happens in the network's precision, promotion after it",
        "dtype = torch.promote_types(working(x).dtype, output.dtype)",
        "dtype = output.dtype",
        "test_half_precision_outputs_are_promoted_first",
    ),
    (
        "prediction: the state is rounded to the network's precision",
        "self.x, self.output = x.to(dtype), output.to(dtype)",
        "self.x, self.output = x.to(output.dtype).to(dtype), output.to(dtype)",
        "test_half_precision_outputs_are_promoted_first",
    ),
    (
        "prediction: coefficients of a jump are formed in float32",
        "of_x = np.asarray((a * self._q - s * self._p) / determinant)",
        "of_x = np.asarray((a * self._q - s * self._p) / determinant).astype(np.float32).astype(np.float64)",
        "test_jump_is_alpha_x0_plus_sigma_eps",
    ),
)

CONSISTENCY = planted(
    "diffusion/consistency.py",
    "diffusion/test_consistency.py",
    (
        "consistency: the timestep is not scaled by ten",
        "np.maximum(np.asarray(t, dtype=np.float64), 0) * timestep_scaling",
        "np.maximum(np.asarray(t, dtype=np.float64), 0)",
        "test_lcm_scalings_by_formula_and_figure",
    ),
    (
        "consistency: c_out carries sigma_data, as EDM's does",
        "np.asarray(q / np.sqrt(q**2 + sigma_data**2))",
        "np.asarray(sigma_data * q / np.sqrt(q**2 + sigma_data**2))",
        "test_lcm_scalings_by_formula_and_figure",
    ),
    (
        "consistency: sigma_data is not squared in c_skip",
        "np.asarray(sigma_data**2 / (q**2 + sigma_data**2))",
        "np.asarray(sigma_data / (q**2 + sigma_data))",
        "test_lcm_scalings_by_formula_and_figure",
    ),
    (
        "consistency: EDM's c_skip is not shifted by sigma_min",
        "c_skip = sigma_data**2 / ((t - schedule.sigma_min) ** 2 + sigma_data**2)",
        "c_skip = sigma_data**2 / (t**2 + sigma_data**2)",
        "test_edm_is_consistency_models",
    ),
    (
        "consistency: EDM's c_out is not shifted by sigma_min",
        "ratio = (t - schedule.sigma_min) / t",
        "ratio = np.ones_like(t)",
        "test_edm_is_consistency_models",
    ),
    (
        "consistency: EDM's clean data lie before sigma_min",
        "t = np.maximum(t, schedule.sigma_min)",
        "t = np.maximum(t, 1e-9)",
        "test_identity_at_the_end_and_at_clean_data[edm]",
    ),
)

MIXTURE = planted(
    "diffusion/components.py",
    "diffusion/test_mixture.py",
    (
        "mixture: alpha is not squared in the variance",
        "self.variance = alpha**2 * components",
        "self.variance = alpha * components",
        "test_log_prob_is_scipys",
    ),
    (
        "mixture: the likelihood has no determinant",
        "-0.5 * (distance + log_det + dim * math.log(2 * math.pi))",
        "-0.5 * (distance + dim * math.log(2 * math.pi))",
        "test_log_prob_is_scipys",
    ),
    (
        "mixture: isotropic components count their determinant once, not D times",
        "log_det = self.variance.log().expand(dim, -1, -1).sum(0)",
        "log_det = self.variance.log().sum(0)",
        "test_log_prob_is_scipys",
    ),
    (
        "mixture: the posterior mean's gain lacks alpha",
        "self.alpha * self._total(r * gain)",
        "self._total(r * gain)",
        "test_posterior_means_add_up_to_the_state",
    ),
    (
        "mixture: full covariances turn the wrong way back",
        'torch.einsum("ebk,kde->bd", gain * self.difference, self.components.basis)',
        'torch.einsum("ebk,ked->bd", gain * self.difference, self.components.basis)',
        "test_posterior_means_add_up_to_the_state",
    ),
) + planted(
    "diffusion/mixture.py",
    "diffusion/test_mixture.py",
    (
        "mixture: responsibilities forget the component weights",
        "torch.softmax(evidence + self.class_weights_of(label, evidence.device).log(), dim=-1)",
        "torch.softmax(evidence + (self.class_weights_of(label, evidence.device) > 0).log(), dim=-1)",
        "test_x0_by_brute_force_in_one_dimension",
    ),
    (
        "mixture: guidance starts from the conditional field",
        "return null + self._coefficient(guidance_scale, evidence) * (conditional - null)",
        "return conditional + self._coefficient(guidance_scale, evidence) * (conditional - null)",
        "test_guidance_is_null_plus_w_times_the_difference",
    ),
    (
        "mixture: guided weights are kept from being negative",
        "return null + self._coefficient(guidance_scale, evidence) * (conditional - null)",
        "return (null + self._coefficient(guidance_scale, evidence) * (conditional - null)).clamp_min(0)",
        "test_guidance_is_null_plus_w_times_the_difference",
    ),
    (
        "mixture: the unconditional field is the first class",
        "else [given.class_weights, given.weights[None]]",
        "else [given.class_weights, given.class_weights[:1]]",
        "test_log_prob_is_scipys",
    ),
    (
        "mixture: samples spread by the variance",
        "noise = noise * components.variances.sqrt()[which]",
        "noise = noise * components.variances[which]",
        "test_samples_have_the_mixtures_moments",
    ),
)

FLOW_MAP = (
    planted(
        "diffusion/mixture.py",
        "diffusion/test_flow_map.py",
        (
            "flow map: one Gaussian stretches by the variance ratio, not its root",
            "(alpha_t**2 * variance + sigma_t**2)).sqrt()",
            "(alpha_t**2 * variance + sigma_t**2))",
            "test_one_gaussian_written_as_two[1-route0]",
        ),
        (
            "flow map: the start's radius is forgotten, right for VP alone",
            "flat / math.hypot(alpha_t, sigma_t)",
            "flat",
            "test_the_schedule_only_changes_coordinates",
        ),
        (
            "flow map: clean data pull the wrong way",
            "return cos * epsilon - sin * x0",
            "return cos * epsilon + sin * x0",
            "test_products_of_lines_act_per_coordinate",
        ),
        (
            "flow map: guidance is left out of the field",
            "self.posterior(z, cos, sin, label, guidance_scale)",
            "self.posterior(z, cos, sin, label)",
            "test_guided_map",
        ),
        (
            "flow map: a guided line is mapped by quantiles",
            "if self.dim == 1 and (label is None or (scale == 1).all())",
            "if self.dim == 1",
            "test_guided_map",
        ),
    )
    + planted(
        "diffusion/quantiles.py",
        "diffusion/test_flow_map.py",
        (
            "quantiles: component weights do not follow the order of the means",
            "weights[..., order].log()",
            "weights.log()",
            "test_quantiles_keep_probability[three]",
        ),
        (
            "quantiles: noise does not widen the components",
            "alpha**2 * variances[order] + sigma**2",
            "alpha**2 * variances[order] + 0 * sigma**2",
            "test_quantiles_keep_probability[gmm-a]",
        ),
        (
            "quantiles: one pivot for all, so gaps lose their digits",
            "pivot = _best_pivot(source, z)",
            "pivot = _best_pivot(source, z) * 0",
            "test_far_tails_and_gaps_keep_their_digits",
        ),
    )
    + planted(
        "diffusion/integrate.py",
        "diffusion/test_flow_map.py",
        (
            "integrator: extrapolates in h, not in its square",
            "ratio = (n / SUBSTEPS[j - i]) ** 2 - 1",
            "ratio = n / SUBSTEPS[j - i] - 1",
            "test_integrator_order_and_direction",
        ),
    )
)

DENOISER = planted(
    "models/denoiser.py",
    "models/test_denoiser.py",
    (
        "denoiser: guidance starts from the conditional branch, w off by one",
        "return without + scale * (with_ - without), with_",
        "return with_ + scale * (with_ - without), with_",
        "test_guidance_in_one_batch_in_two_calls_and_by_formula",
    ),
    (
        "denoiser: guidance pushes away from the condition",
        "return without + scale * (with_ - without), with_",
        "return without - scale * (with_ - without), with_",
        "test_guidance_in_one_batch_in_two_calls_and_by_formula",
    ),
    (
        "denoiser: the batched branches change places",
        "without, with_ = both.chunk(2)",
        "with_, without = both.chunk(2)",
        "test_guidance_in_one_batch_in_two_calls_and_by_formula",
    ),
    (
        "denoiser: guidance in two calls asks the condition twice",
        "without, with_ = self._ask(x, times, null, extras), self._ask(x, times, cond, extras)",
        "without, with_ = self._ask(x, times, cond, extras), self._ask(x, times, cond, extras)",
        "test_guidance_in_one_batch_in_two_calls_and_by_formula",
    ),
    (
        "denoiser: the null branch keeps its condition",
        "times, null = self._times(t, x), cond.null()",
        "times, null = self._times(t, x), cond",
        "test_null_comes_first_and_extras_reach_both_branches",
    ),
    (
        "denoiser: guidance is combined in the network's precision",
        "dtype = torch.promote_types(working(x).dtype, without.dtype)",
        "dtype = without.dtype",
        "test_half_precision_networks",
    ),
    (
        "denoiser: the network is told the target time 0, whatever it is",
        'extras["end"] = self._times(end, x)',
        'extras["end"] = self._times(end, x) * 0',
        "test_null_comes_first_and_extras_reach_both_branches",
    ),
    (
        "denoiser: the told guidance scale is that of the first row",
        'extras["guidance_embed"] = embed.expand(x.shape[0])',
        'extras["guidance_embed"] = embed.reshape(-1)[:1].expand(x.shape[0])',
        "test_null_comes_first_and_extras_reach_both_branches",
    ),
    (
        "denoiser: whole table indices reach the network as fractions",
        "dtype = torch.int64 if whole else working(x).dtype",
        "dtype = working(x).dtype",
        "test_times_a_network_sees",
    ),
    (
        "denoiser: fractional times are cut to whole ones",
        "(not times.is_floating_point() or _is_whole(t))",
        "True",
        "test_times_a_network_sees",
    ),
    (
        "denoiser: a batch counts as one image",
        "self.cost.evaluations += images",
        "self.cost.evaluations += 1",
        "test_cost_counts_calls_images_and_graphs",
    ),
    (
        "denoiser: calls without a graph count a backward pass",
        "self.cost.graph_evaluations += images if graph else 0",
        "self.cost.graph_evaluations += images",
        "test_cost_counts_calls_images_and_graphs",
    ),
    (
        "denoiser: a backward pass counts as one forward",
        "return self.evaluations + 2 * self.graph_evaluations",
        "return self.evaluations + self.graph_evaluations",
        "test_cost_counts_calls_images_and_graphs",
    ),
    (
        "denoiser: a scale below 1 is taken as off",
        "guidance_scale != 1.0:",
        "guidance_scale > 1.0:",
        "test_guidance_in_one_batch_in_two_calls_and_by_formula",
    ),
    (
        "denoiser: features are not counted",
        "self._count(x.shape[0] / 2, any(feature.requires_grad for feature in features))",
        "pass",
        "tests/models/test_roles.py::test_features_are_the_roles_own_and_counted",
    ),
    (
        "denoiser: EDM's c_in lacks its square root, as in a public script",
        "sigma * sigma_data / root, 1 / root\n",
        "sigma * sigma_data / root, 1 / root**2\n",
        "test_edm_preconditioning_is_the_papers",
    ),
    (
        "denoiser: EDM's c_noise is log(sigma) over two",
        "noise = t.clamp_min(math.exp(-100)).log() / 4",
        "noise = t.clamp_min(math.exp(-100)).log() / 2",
        "test_edm_preconditioning_is_the_papers",
    ),
    (
        "denoiser: EDM's c_skip x is rounded to the network's precision",
        "return expand(c_skip, x) * x + expand(c_out, x) * raw.to(x.dtype)",
        "return (expand(c_skip, x) * x).to(raw.dtype).to(x.dtype) + expand(c_out, x) * raw.to(x.dtype)",
        "test_edm_preconditioning_keeps_the_states_digits",
    ),
) + planted(
    "models/cond.py",
    "models/test_cond.py",
    (
        "condition: dropout keeps the rows it should drop",
        "torch.where(rows[k], null[k], t)",
        "torch.where(rows[k], t, null[k])",
        "test_drop_replaces_rows",
    ),
    (
        "condition: part of a batch keeps the null rows of the whole",
        "null = {k: t if t.shape[0] == 1 else pick(t) for k, t in null.items()}",
        "null = {k: t[:1] if t.shape[0] == 1 else t for k, t in null.items()}",
        "test_parts_of_a_batch",
    ),
)

ROLES = (
    planted(
        "models/lora.py",
        "models/test_roles.py",
        (
            "roles: recomputation in backward does not capture the adapter",
            "        with live(adapters):\n            return function(*inputs)",
            "        with live(_LIVE.get()):\n            return function(*inputs)",
            "test_checkpointing_recomputes_under_its_own_adapter[live_in_backward1]",
        ),
        (
            "roles: an exception leaves the adapter live",
            "    try:\n        yield\n    finally:\n        _LIVE.reset(token)",
            "    yield\n    _LIVE.reset(token)",
            "test_an_exception_leaves_no_adapter_live",
        ),
        (
            "roles: alpha defaults to peft's 8, not to the rank",
            "scale: Any = rank if alpha is None else alpha",
            "scale: Any = 8 if alpha is None else alpha",
            "test_alpha_defaults_to_rank_and_a_is_seeded",
        ),
        (
            "roles: the base's parameters can be trained",
            "    for parameter in base_parameters(module):\n        parameter.requires_grad_(False)",
            "    for parameter in base_parameters(module):\n        parameter.requires_grad_(True)",
            "test_teacher_is_the_same_to_the_bit[lora]",
        ),
        (
            "roles: adapters are kept in the base's half precision",
            "part[name].to(dtype=dtype).requires_grad_(True)",
            "part[name].to(dtype=layer.weight.dtype).requires_grad_(True)",
            "test_masters_are_float32_whatever_the_base_holds",
        ),
        (
            "roles: every live adapter acts, whoever asks",
            "return list(_LIVE.get())",
            "return list(self.lora_A) if _LIVE.get() else []",
            "test_two_adapters_do_not_see_each_other",
        ),
    )
    + planted(
        "models/roles.py",
        "models/test_roles.py",
        (
            "roles: the teacher sees the student's adapter",
            "self._view(RoleNetwork(self.base, (), None, autocast))",
            'self._view(RoleNetwork(self.base, ("student",), None, autocast))',
            "test_teacher_is_the_same_to_the_bit[lora]",
        ),
        (
            "roles: LoRA's A comes from the global generator",
            "torch.manual_seed(self.seed)",
            "pass",
            "test_alpha_defaults_to_rank_and_a_is_seeded",
        ),
        (
            "roles: making a LoRA moves everybody's random numbers",
            "with torch.random.fork_rng(devices=[]):",
            "if True:",
            "test_alpha_defaults_to_rank_and_a_is_seeded",
        ),
        (
            "roles: the EMA goes the other way",
            "torch._foreach_lerp_(mine, theirs, 1 - decay)",
            "torch._foreach_lerp_(mine, theirs, decay)",
            "test_a_follower_is_the_exact_moving_average",
        ),
        (
            "roles: every follower moves with the first one's decay",
            "torch._foreach_lerp_(mine, theirs, 1 - decay)",
            "torch._foreach_lerp_(mine, theirs, 1 - next(iter(self._followers.values()))[1])",
            "test_a_follower_is_the_exact_moving_average",
        ),
        (
            "roles: followers can be trained",
            "            tensor.requires_grad_(False)",
            "            tensor.requires_grad_(True)",
            "test_a_follower_is_the_exact_moving_average",
        ),
        (
            "roles: a follower forgets its leader's LoRA scale",
            "alpha=scale * rank, targets=targets",
            "alpha=rank, targets=targets",
            "test_a_follower_with_another_scale_answers_as_its_leader",
        ),
        (
            "roles: a follower starts from random weights",
            "copy_tensors(tensors, self._tensors[source])",
            "pass",
            "test_a_follower_with_another_scale_answers_as_its_leader",
        ),
        (
            "roles: a full-weight student is the teacher's own network",
            "return copy.deepcopy(network)",
            "return network",
            "test_teacher_is_the_same_to_the_bit[full]",
        ),
        (
            "roles: full weights stay in half precision",
            "parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))",
            "parameter.data.clone()",
            "test_masters_are_float32_whatever_the_base_holds",
        ),
        (
            "roles: a target without EMA is counted twice",
            "for view in {id(v): v for v in self._views.values()}.values():",
            "for view in self._views.values():",
            "test_cost_adds_up_over_roles",
        ),
        (
            "roles: a network's own LoRA targets are ignored",
            'targets = weights.targets or getattr(network, "lora_targets", None)',
            "targets = weights.targets",
            "test_a_networks_own_targets_are_the_default",
        ),
        (
            "roles: the teacher drops out",
            "self.base.eval().requires_grad_(False)",
            "self.base.requires_grad_(False)",
            "test_the_teacher_has_no_dropout",
        ),
        (
            "roles: a discriminator's features are the teacher's",
            "        with live(self.adapters), self._precision(x):\n            features",
            "        with live(()), self._precision(x):\n            features",
            "test_features_are_the_roles_own_and_counted",
        ),
        (
            "roles: every follower follows everybody",
            "if leader == source:",
            "if True:",
            "tests/training/test_step.py::test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "roles: an average answers in the teacher's kind, not in its leader's",
            "self.autocast), self._views[source])",
            "self.autocast))",
            "test_views_ask_as_the_teacher_does",
        ),
        (
            "roles: views forget that guidance takes two calls",
            "batched_guidance=like.batched_guidance",
            "batched_guidance=True",
            "test_views_ask_as_the_teacher_does",
        ),
        (
            "roles: extra inputs are not among the student's tensors",
            "extras.named_parameters()}\n        self._tensors[name] = tensors",
            "extras.named_parameters() if not k}\n        self._tensors[name] = tensors",
            "test_extra_inputs_start_at_zero_and_learn",
        ),
    )
    + planted(
        "models/extras.py",
        "models/test_roles.py",
        (
            "extra inputs: the embedded scale counts from 1, LCM's from 0",
            "1000 * (value - 1)",
            "1000 * value",
            "test_embeddings_are_lcms",
        ),
        (
            "extra inputs: the student does not begin as the teacher",
            "nn.init.zeros_(layer.weight)",
            "pass",
            "test_extra_inputs_start_at_zero_and_learn",
        ),
        (
            "extra inputs: half precision phases",
            "value = value.to(torch.promote_types(value.dtype, torch.float32))",
            "pass",
            "test_embeddings_are_lcms",
        ),
        (
            "extra inputs: frequencies divide by half the width, not by one less",
            "(-math.log(10000.0) / (half - 1))",
            "(-math.log(10000.0) / half)",
            "test_embeddings_are_lcms",
        ),
    )
)

NETWORKS = planted(
    "models/mlp.py",
    "models/test_mlp.py",
    (
        "mlp: no condition is class 0",
        "self.label(label + 1)",
        "self.label(label.clamp_min(0))",
        "test_every_input_is_heard",
    ),
    (
        "mlp: the target time is not heard",
        "emb = emb + self.end(self._level(end, x))",
        "pass",
        "test_every_input_is_heard",
    ),
) + planted(
    "models/families/teacher.py",
    "models/test_families.py",
    (
        "families: the posterior's deviation is not scaled",
        "return (mean - shift) * factor, std * factor",
        "return (mean - shift) * factor, std",
        "test_latents_are_shifted_and_scaled_and_back",
    ),
    (
        "families: latents are shifted the wrong way",
        "return (mean - shift) * factor",
        "return (mean + shift) * factor",
        "test_latents_are_shifted_and_scaled_and_back",
    ),
    (
        "families: latents are shifted before they are scaled back",
        "/ factor + shift",
        "+ shift / factor",
        "test_latents_are_shifted_and_scaled_and_back",
    ),
)

SAMPLING = (
    planted(
        "sampling/samplers.py",
        "sampling/test_truth.py",
        (
            "sampling: re-noising ignores that the signal shrinks",
            "np.sqrt(np.maximum(sigma_t**2 - (ratio * sigma_s) ** 2, 0))",
            "np.sqrt(np.maximum(sigma_t**2 - sigma_s**2, 0))",
            "test_tcd_on_flow_scales_the_time",
        ),
        (
            "sampling: re-noising adds the difference of the levels",
            "np.sqrt(np.maximum(sigma_t**2 - (ratio * sigma_s) ** 2, 0))",
            "np.maximum(sigma_t - ratio * sigma_s, 0)",
            "test_exact_lcm_renoises_from_index_0",
        ),
        (
            "sampling: exact LCM still takes its answer as clean",
            'lives_at = schedule.end if self.exact or schedule.family == "edm" else schedule.clean',
            'lives_at = schedule.end if schedule.family == "edm" else schedule.clean',
            "test_exact_lcm_renoises_from_index_0",
        ),
        (
            "sampling: LCM re-noises to the time it came from",
            "renoise(schedule, x0, lives_at, at.next, at.draw())",
            "renoise(schedule, x0, lives_at, at.time, at.draw())",
            "test_multistep_consistency_on_edm_follows_algorithm_1",
        ),
        (
            "sampling: LCM takes x0 itself, without the boundary scalings",
            "x0, schedule = consistency(at.prediction), at.schedule",
            "x0, schedule = at.prediction.x0, at.schedule",
            "test_multistep_consistency_on_edm_follows_algorithm_1",
        ),
        (
            "sampling: LCM's student is told to land at clean data",
            "        return float(schedule.end)\n\n    def step",
            "        return float(schedule.clean)\n\n    def step",
            "test_a_student_of_lcm_is_told_the_schedules_end",
        ),
        (
            "sampling: LCM re-noises after its last step too",
            "        if at.last:\n            return x0",
            "        if False:\n            return x0",
            "test_the_last_step_draws_nothing",
        ),
        (
            "sampling: TCD re-noises after its last step too",
            "            return float(max(math.floor(s + 1e-9), next_time if last else 0))\n"
            "        return max(s, float(next_time if last else schedule.end))\n\n"
            "    def step(self, at: Step) -> Tensor:\n"
            "        s = self.end(at.schedule, at.time, at.next, at.last)\n"
            "        x = at.prediction.at(s)\n"
            "        if at.last or self.eta == 0:",
            "            return float(max(math.floor(s + 1e-9), next_time if last else 0))\n"
            "        return max(s, float(next_time if last else schedule.end))\n\n"
            "    def step(self, at: Step) -> Tensor:\n"
            "        s = self.end(at.schedule, at.time, at.next, at.last)\n"
            "        x = at.prediction.at(s)\n"
            "        if self.eta == 0:",
            "test_the_last_step_draws_nothing",
        ),
        (
            "sampling: TCD rounds its landing time, instead of rounding it down",
            "math.floor(s + 1e-9)",
            "round(s)",
            "tests/sampling/test_parity.py::test_explicit_timesteps_are_those_of_diffusers",
        ),
        (
            "sampling: TCD's eta means what is kept, not what is new",
            "s = (1 - self.eta) * next_time",
            "s = self.eta * next_time",
            "test_tcd_jumps_where_the_spec_says",
        ),
        (
            "sampling: CTM scales the noise level from 0, not from the end",
            "math.sqrt(1 - self.eta**2) * (schedule.eta(next_time) - lowest) + lowest",
            "math.sqrt(1 - self.eta**2) * schedule.eta(next_time)",
            "test_ctm_on_edm_is_the_official_gamma_sampler",
        ),
        (
            "sampling: CTM's gamma scales the level by 1 - gamma",
            "math.sqrt(1 - self.eta**2) * (schedule.eta(next_time) - lowest) + lowest",
            "(1 - self.eta) * (schedule.eta(next_time) - lowest) + lowest",
            "test_ctm_on_edm_is_the_official_gamma_sampler",
        ),
        (
            "sampling: phased noise does not keep its variance",
            "kept = at.prediction.combine(alpha, np.asarray(sigma * math.sqrt(1 - self.eta**2)))",
            "kept = at.prediction.combine(alpha, np.asarray(sigma * (1 - self.eta)))",
            "test_phased_sampling_visits_the_edges",
        ),
        (
            "sampling: the ancestral step's ratio is not squared",
            "1 - (sigma * alpha_t / (alpha * sigma_t)) ** 2",
            "1 - (sigma * alpha_t / (alpha * sigma_t))",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[euler-ancestral-epsilon-4]",
        ),
        (
            "sampling: the ancestral step keeps sigma - std of the noise",
            "np.sqrt(sigma**2 - std**2)",
            "sigma - std",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[euler-ancestral-epsilon-4]",
        ),
        (
            "sampling: DDIM's eta is all or nothing",
            "std = np.asarray(eta * sigma * np.sqrt(",
            "std = np.asarray(sigma * np.sqrt(",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64"
            "[ddim, leading, as Stable Diffusion-epsilon-4]",
        ),
        (
            "sampling: Heun's second slope is taken at the first time",
            "second = at.ask(jump, at.next)",
            "second = at.ask(jump, at.time)",
            "test_heun_on_edm_is_algorithm_1",
        ),
        (
            "sampling: Heun adds its slopes instead of averaging them",
            "slope = np.asarray(alpha * (sigma / alpha - sigma_t / alpha_t) / 2)",
            "slope = np.asarray(alpha * (sigma / alpha - sigma_t / alpha_t))",
            "test_heun_on_edm_is_algorithm_1",
        ),
        (
            "sampling: Heun's rows that end at clean data keep a slope that does not exist",
            "return torch.where(mask.to(x.device, non_blocking=True), second.x, x)",
            "return x",
            "tests/methods/test_cm.py::test_a_step_is_the_papers[flow-sample-cd-full-True]",
        ),
        (
            "sampling: Heun on flow takes one of its slopes twice",
            "first.flow + second.combine(-1.0, 1.0, euler)",
            "first.flow + first.flow",
            "test_solvers_converge_to_the_flow_map_at_their_order[heun-2-2-schedule2-flow]",
        ),
        (
            "sampling: DPM-Solver++'s ratio of steps is inverted",
            "return (lambdas[2] - lambdas[1]) / (lambdas[1] - lambdas[0])",
            "return (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[dpm++ 2M-epsilon-4]",
        ),
        (
            "sampling: DPM-Solver++ corrects without the half",
            "(alpha - sigma * alpha_t / sigma_t) * ratio / 2",
            "(alpha - sigma * alpha_t / sigma_t) * ratio",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[dpm++ 2M-epsilon-4]",
        ),
        (
            "sampling: DPM-Solver++ ends with second order in few steps too",
            "self.num_steps < 15",
            "self.num_steps < 0",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64"
            "[dpm++ 2M, leading, to sigma_min-epsilon-4]",
        ),
        (
            "sampling: DPM-Solver++'s leading grid has a point too few",
            "(total // (n + 1))",
            "((total - 1) // n)",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64"
            "[dpm++ 2M, leading, to sigma_min-epsilon-4]",
        ),
    )
    + planted(
        "sampling/sample.py",
        "sampling/test_truth.py",
        (
            "sampling: a multistep sampler remembers its first step for ever",
            "        if sampler.multistep:",
            "        if sampler.multistep and before is None:",
            "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[dpm++ 2M-epsilon-4]",
        ),
        (
            "sampling: an EDM run starts from unit noise",
            'if start == "unit" and schedule.family != "edm":',
            'if start == "unit":',
            "test_starts",
        ),
        (
            "sampling: the table's start is scaled by alpha",
            "expand(schedule.alpha_sigma(time)[1], noise) * noise",
            "expand(schedule.alpha_sigma(time)[schedule.family != 'vp'], noise) * noise",
            "test_starts",
        ),
        (
            "sampling: a student is told the next time, not where the sampler lands",
            "end = sampler.end(denoiser.schedule, time, next_time, last) if told else None",
            "end = next_time if told else None",
            "test_a_student_is_told_where_to_land_and_its_guidance",
        ),
        (
            "sampling: injected noises are used in the wrong order",
            "noise = self.noises[self.used].to(",
            "noise = self.noises[-1 - self.used].to(",
            "test_exact_lcm_renoises_from_index_0",
        ),
        (
            "sampling: a run is not guided",
            "return denoiser(x, t, cond, guidance_scale, end=end",
            "return denoiser(x, t, cond, end=end",
            "test_every_step_is_guided",
        ),
    )
    + planted(
        "sampling/solvers.py",
        "sampling/test_truth.py",
        (
            "sampling: the teacher's solver is not guided",
            "_no_noise, cond, guidance_scale)",
            "_no_noise, cond)",
            "test_every_step_is_guided",
        ),
    )
    + planted(
        "sampling/grids.py",
        "sampling/test_truth.py",
        (
            "sampling: phased sampling steps off the phases' edges",
            "np.ascontiguousarray(schedule.phase_edges(n, original_steps)[:0:-1])",
            "np.asarray(schedule.timesteps(n), dtype=np.float64)",
            "test_public_grids_by_name[phases-4-expected7]",
        ),
        (
            "sampling: the turbo grid stretches over the whole schedule",
            "np.arange(n) * (total // 10)",
            "np.arange(n) * (total // n)",
            "test_public_grids_by_name[turbo-4-expected5]",
        ),
        (
            "sampling: a Karras grid asks for levels as if they were times",
            "times = schedule.time_at(schedule.karras(n))",
            "times = schedule.karras(n) * schedule.start / schedule.karras(n)[0]",
            "test_karras_keeps_its_noise_levels",
        ),
    )
)

METHODS = (
    planted(
        "methods/parts/hops.py",
        "methods/test_lcm.py",
        (
            "methods: the teacher is asked at the lower time",
            "first = teacher(x, t, batch.cond, guidance_scale=guidance_scale)",
            "first = teacher(x, u, batch.cond, guidance_scale=guidance_scale)",
            "test_a_step_is_the_papers",
        ),
        (
            "methods: the teacher is not guided",
            "first = teacher(x, t, batch.cond, guidance_scale=guidance_scale)",
            "first = teacher(x, t, batch.cond)",
            "test_a_step_is_the_papers[vp-epsilon-guided-full-True]",
        ),
        (
            "methods: the data are noised to the lower time",
            "x_t = schedule.add_noise(batch.x0, noise, times[0])",
            "x_t = schedule.add_noise(batch.x0, noise, times[-1])",
            "test_a_step_is_the_papers",
        ),
        (
            "methods: a drawn guidance scale is not what the teacher is given",
            "return self.low if self.fixed else drawn",
            "return self.low",
            "test_a_step_is_the_papers[vp-epsilon-drawn scale-full-True]",
        ),
        (
            "methods: a scale of 1 pays for a null branch",
            "return self.low == self.high",
            "return False",
            "tests/training/test_step.py::test_a_scale_of_one_costs_no_null_branch",
        ),
        (
            "methods: the guidance scale is drawn from 0 to the top of its range",
            'rng.sample.uniform("guidance_scale", self.low, self.high)',
            'rng.sample.uniform("guidance_scale", 0.0, self.high)',
            "test_draws_cover_every_hop_and_the_whole_range_of_scales",
        ),
    )
    + planted(
        "methods/parts/distances.py",
        "methods/test_lcm.py",
        (
            "methods: the Huber loss does not vanish at 0",
            "each = ((difference.square() + huber_c**2).sqrt() - huber_c).mean(1)",
            "each = (difference.square() + huber_c**2).sqrt().mean(1)",
            "test_a_step_is_the_papers[vp-epsilon-guided-full-True]",
        ),
        (
            "methods: the Huber loss takes the norm of a sample, not its elements",
            "each = ((difference.square() + huber_c**2).sqrt() - huber_c).mean(1)",
            "each = (difference.square().mean(1) + huber_c**2).sqrt() - huber_c",
            "test_a_step_is_the_papers[vp-epsilon-guided-full-True]",
        ),
        (
            "methods: squared errors are added up within a sample",
            "each = difference.square().mean(1)",
            "each = difference.square().sum(1)",
            "test_a_step_is_the_papers[vp-epsilon-unguided-full-True]",
        ),
    )
    + planted(
        "methods/lcm.py",
        "methods/test_lcm.py",
        (
            "lcm: the target keeps its graph",
            "        with torch.no_grad():\n            target = consistency(",
            "        if True:\n            target = consistency(",
            "test_no_gradient_flows_through_the_target",
        ),
        (
            "lcm: a step goes up, from the lower time",
            "t, u = self.grid[draws.index + 1], self.grid[draws.index]",
            "u, t = self.grid[draws.index + 1], self.grid[draws.index]",
            "test_a_step_is_the_papers",
        ),
        (
            "lcm: the student is asked at the target's time",
            "roles.student(shared.x_t, shared.t, batch.cond",
            "roles.student(shared.x_t, shared.u, batch.cond",
            "test_a_step_is_the_papers",
        ),
        (
            "lcm: the target is the student, not its average",
            "consistency(roles.target(hop.x_u, u",
            "consistency(roles.student(hop.x_u, u",
            "test_the_ema_target_is_the_lagging_weights_not_the_student",
        ),
        (
            "lcm: the target answers at the upper time",
            "consistency(roles.target(hop.x_u, u, batch.cond",
            "consistency(roles.target(hop.x_u, t, batch.cond",
            "test_the_lowest_hop_is_anchored_to_the_teacher_to_the_bit",
        ),
        (
            "lcm: the scale the student is told counts from 0",
            "embed = draws.guidance_scale if self.settings.guidance_embed else None",
            "embed = draws.guidance_scale - 1 if self.settings.guidance_embed else None",
            "test_a_step_is_the_papers[vp-epsilon-told scale-full-True]",
        ),
        (
            "lcm: the top hop is never drawn",
            'rng.sample.integers("index", 0, self.settings.num_grid_steps)',
            'rng.sample.integers("index", 0, self.settings.num_grid_steps - 1)',
            "test_draws_cover_every_hop_and_the_whole_range_of_scales",
        ),
    )
    + planted(
        "methods/tcd.py",
        "methods/test_tcd.py",
        (
            "tcd: the target keeps its graph",
            "        with torch.no_grad():\n            target = roles.target(",
            "        if True:\n            target = roles.target(",
            "test_no_gradient_flows_through_the_target",
        ),
        (
            "tcd: the target stays where the teacher landed",
            "batch.cond, end=told).at(s)",
            "batch.cond, end=told).at(u)",
            "test_a_step_is_the_papers",
        ),
        (
            "tcd: s = u is never drawn",
            "(fraction * (index + 1)).to(torch.int64)",
            "(fraction * index).to(torch.int64)",
            "test_draws_cover_every_hop_and_every_end_below_it",
        ),
        (
            "tcd: s may lie above u",
            "(fraction * (index + 1)).to(torch.int64)",
            "(fraction * (index + 2)).to(torch.int64)",
            "test_draws_cover_every_hop_and_every_end_below_it",
        ),
        (
            "tcd: the grid's end is never drawn",
            "(fraction * (index + 1)).to(torch.int64)",
            "(fraction * (index + 1)).ceil().to(torch.int64).minimum(index)",
            "test_draws_cover_every_hop_and_every_end_below_it",
        ),
        (
            "tcd: the student is told u instead of s",
            "told = s if self.settings.tell_end else None",
            "told = u if self.settings.tell_end else None",
            "test_a_step_is_the_papers[vp-epsilon-told end-full-True]",
        ),
        (
            "tcd: the student jumps to u",
            "distance(said.at(shared.s), shared.target",
            "distance(said.at(shared.u), shared.target",
            "test_a_step_is_the_papers",
        ),
    )
    + planted(
        "methods/parts/hops.py",
        "methods/test_cm.py",
        (
            "cm: EDM teachers step by Euler",
            '("heun" if schedule.family == "edm" else "ddim")',
            '"ddim"',
            "test_edm_networks_are_preconditioned_as_the_paper_says",
        ),
        (
            "cm: the teacher's second slope is asked at the upper time",
            "heun(first, teacher(x, u, batch.cond, guidance_scale=guidance_scale))",
            "heun(first, teacher(x, t, batch.cond, guidance_scale=guidance_scale))",
            "test_a_step_is_the_papers[edm-sample-cd-full-True]",
        ),
        (
            "cm: the teacher's second slope is not guided",
            "heun(first, teacher(x, u, batch.cond, guidance_scale=guidance_scale))",
            "heun(first, teacher(x, u, batch.cond))",
            "test_a_step_is_the_papers[edm-sample-cd guided-full-True]",
        ),
        (
            "cm: the second slope comes from the student",
            "heun(first, teacher(x, u, batch.cond, guidance_scale=guidance_scale))",
            "heun(first, roles.student(x, u, batch.cond, guidance_scale=guidance_scale))",
            "test_a_step_is_the_papers[edm-sample-cd-full-True]",
        ),
        (
            "cm: consistency training draws a noise of its own for the lower time",
            "schedule.add_noise(batch.x0, noise, t), schedule.add_noise(batch.x0, noise, u), None)",
            "schedule.add_noise(batch.x0, noise, t), schedule.add_noise(batch.x0, noise.roll(1, 0), u), None)",
            "test_ct_uses_one_noise_for_both_times",
        ),
        (
            "cm: consistency training turns its noise round at the lower time",
            "schedule.add_noise(batch.x0, noise, t), schedule.add_noise(batch.x0, noise, u), None)",
            "schedule.add_noise(batch.x0, noise, t), schedule.add_noise(batch.x0, -noise, u), None)",
            "test_a_step_is_the_papers[vp-epsilon-ct-full-True]",
        ),
    )
    + planted(
        "methods/parts/dropout.py",
        "methods/test_cm.py",
        (
            "cm: two forwards drop different units",
            "torch.manual_seed(seed)",
            "torch.seed()",
            "test_student_and_target_drop_the_same_and_others_are_left_alone",
        ),
        (
            "cm: only the CPU's generator is put back after a forward",
            "devices = [] if device.type == \"cpu\" else [device]",
            "devices = []",
            "test_dropout_seeds_fork_the_generator_of_the_device",
        ),
    )
    + planted(
        "methods/parts/distances.py",
        "methods/test_cm.py",
        (
            "cm: iCT's Huber constant does not grow with the dimension",
            "c = huber_c * math.sqrt(difference.shape[1])",
            "c = huber_c",
            "test_a_step_is_the_papers[vp-epsilon-ict-full-True]",
        ),
        (
            "cm: iCT's Huber loss takes the mean of squares, not their sum",
            "each = (difference.square().sum(1) + c**2).sqrt() - c",
            "each = (difference.square().mean(1) + c**2).sqrt() - c",
            "test_a_step_is_the_papers[vp-epsilon-ict-full-True]",
        ),
        (
            "cm: the weights multiply the mean, not the samples",
            "(expand(weight, each) * each).mean()",
            "expand(weight, each).mean() * each.mean()",
            "test_a_step_is_the_papers[vp-epsilon-ict-full-True]",
        ),
    )
    + planted(
        "methods/cm.py",
        "methods/test_cm.py",
        (
            "cm: the target keeps its graph",
            "with torch.no_grad(), self._same_dropout(draws):",
            "with self._same_dropout(draws):",
            "test_no_gradient_flows_through_the_target",
        ),
        (
            "cm: the student has no graph",
            "consistency(roles.student(shared.x_t, shared.t, batch.cond))",
            "consistency(roles.student(shared.x_t, shared.t, batch.cond)).detach().requires_grad_()",
            "tests/methods/test_contract.py::test_each_loss_reaches_its_players_parameters_and_nobody_elses",
        ),
        (
            "cm: the target is the student, not its average",
            "consistency(roles.target(hop.x_u, hop.u",
            "consistency(roles.student(hop.x_u, hop.u",
            "test_the_ema_target_is_the_lagging_weights_not_the_student",
        ),
        (
            "cm: the target is the teacher",
            "consistency(roles.target(hop.x_u, hop.u",
            "consistency(roles.teacher(hop.x_u, hop.u",
            "test_a_step_is_the_papers[vp-epsilon-ct-full-True]",
        ),
        (
            "cm: the target answers at the upper time",
            "consistency(roles.target(hop.x_u, hop.u",
            "consistency(roles.target(hop.x_u, hop.t",
            "test_the_lowest_hop_is_anchored_to_the_bit",
        ),
        (
            "cm: the target starts from the student's state",
            "consistency(roles.target(hop.x_u, hop.u",
            "consistency(roles.target(hop.x_t, hop.u",
            "test_the_lowest_hop_is_anchored_to_the_bit",
        ),
        (
            "cm: the student is asked at the target's time",
            "consistency(roles.student(shared.x_t, shared.t",
            "consistency(roles.student(shared.x_t, shared.u",
            "test_a_step_is_the_papers",
        ),
        (
            "cm: the answer is the student's clean data, without its boundary",
            "answer = consistency(roles.student(shared.x_t, shared.t, batch.cond))",
            "answer = roles.student(shared.x_t, shared.t, batch.cond).x0",
            "test_a_step_is_the_papers[edm-sample-ct-full-True]",
        ),
        (
            "cm: hops go up",
            "t=grid[index + 1],\n            u=grid[index],",
            "t=grid[index],\n            u=grid[index + 1],",
            "test_hops_are_neighbours_of_the_papers_grid_all_equally_likely",
        ),
        (
            "cm: a hop skips a grid point",
            "t=grid[index + 1],",
            "t=grid[(index + 2).clamp(max=len(grid) - 1)],",
            "test_hops_are_neighbours_of_the_papers_grid_all_equally_likely",
        ),
        (
            "cm: the weight grows with the hop",
            "return np.asarray(1 / (level(t) - level(u)))",
            "return np.asarray(level(t) - level(u))",
            "test_a_step_is_the_papers[vp-epsilon-ict-full-True]",
        ),
        (
            "cm: the weight of a VP hop counts table steps",
            'level = (lambda time: time.numpy()) if self.schedule.family == "flow"',
            'level = (lambda time: time.numpy()) if self.schedule.family != "edm"',
            "test_a_step_is_the_papers[vp-epsilon-ict-full-True]",
        ),
        (
            "cm: lognormal hops have the variance for a standard deviation",
            "(math.sqrt(2) * self.settings.log_std)",
            "(math.sqrt(2) * self.settings.log_std**2)",
            "test_lognormal_hops_have_the_mass_of_their_log_levels",
        ),
        (
            "cm: the error function lacks its root of two",
            "(math.sqrt(2) * self.settings.log_std)",
            "self.settings.log_std",
            "test_lognormal_hops_have_the_mass_of_their_log_levels",
        ),
        (
            "cm: the mean of log levels has the wrong sign",
            "(log_level - self.settings.log_mean)",
            "(log_level + self.settings.log_mean)",
            "test_lognormal_hops_have_the_mass_of_their_log_levels",
        ),
        (
            "cm: the grid doubles one stretch too late",
            "(math.log2(last // first) + 1)",
            "max(1, math.log2(last // first))",
            "test_the_grid_doubles_in_equal_stretches_of_training",
        ),
        (
            "cm: the grid grows past its last size",
            "return int(min(first * 2 ** (progress.step // stretch), last))",
            "return int(first * 2 ** (progress.step // stretch))",
            "test_the_grid_doubles_in_equal_stretches_of_training",
        ),
        (
            "cm: consistency training asks the teacher",
            'if self.settings.variant == "ct":\n            return data_hop',
            'if self.settings.variant == "ct" and self.solver == "heun":\n            return data_hop',
            "test_a_step_is_the_papers[vp-epsilon-ct-full-True]",
        ),
        (
            "cm: a grid of every table step has a hop of no length",
            "torch.from_numpy(np.unique(self.schedule.training_grid(num_hops)))",
            "torch.from_numpy(self.schedule.training_grid(num_hops))",
            "test_a_grid_of_every_table_step_has_no_empty_hop",
        ),
    )
    + planted(
        "methods/base.py",
        "methods/test_contract.py",
        (
            "methods: a player that is not due every time misses step 0",
            "return step % self.every == 0",
            "return (step + 1) % self.every == 0",
            "test_calls_per_step_are_those_the_denoisers_counted",
        ),
    )
)

RANDOM = planted(
    "data/random.py",
    "training/test_streams.py",
    (
        "random: noise depends on how the batch is split",
        "torch.randn(self.batch_size, *shape, generator=generator, dtype=self.dtype)[self.rows]",
        "torch.randn(self.rows.stop - self.rows.start, *shape, generator=generator, dtype=self.dtype)",
        "tests/methods/test_contract.py::test_micro_batches_see_the_numbers_of_the_whole_batch",
    ),
    (
        "random: every step draws the same per-sample numbers",
        'self._key = (seed, step, "sample")',
        'self._key = (seed, 0, "sample")',
        "test_streams_depend_on_seed_step_and_name",
    ),
    (
        "random: every seed draws the same shared numbers",
        'self._key = (seed, step, "shared")',
        'self._key = (0, step, "shared")',
        "test_streams_depend_on_seed_step_and_name",
    ),
    (
        "random: two names share their noise",
        "generator = torch.Generator().manual_seed(stream_key(*self._key, name))",
        "generator = torch.Generator().manual_seed(stream_key(*self._key))",
        "test_streams_depend_on_seed_step_and_name",
    ),
    (
        "random: keys differ from process to process",
        'digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()',
        'digest = (hash("/".join(map(str, parts))) & (2**63 - 1)).to_bytes(8, "little")',
        "test_keys_are_the_same_everywhere",
    ),
    (
        "random: shared numbers differ between micro-batches",
        "self.shared = SharedRandom(seed, step)",
        "self.shared = SharedRandom(seed, step + self.rows.start)",
        "tests/methods/test_contract.py::test_micro_batches_see_the_numbers_of_the_whole_batch",
    ),
)

DATA = planted(
    "data/sources.py",
    "data/test_sources.py",
    (
        "data: every epoch comes in the same order",
        'stream_key(seed, self.name, epoch)',
        'stream_key(seed, self.name)',
        "test_every_epoch_is_all_items_in_an_order_of_its_own",
    ),
    (
        "data: every step starts at the first item",
        "positions = number * rng.batch_size + np.arange",
        "positions = 0 * number * rng.batch_size + np.arange",
        "test_every_epoch_is_all_items_in_an_order_of_its_own",
    ),
    (
        "data: latents are their posterior's mean",
        "Batch(torch.addcmul(mean, std, noise), cond)",
        "Batch(mean, cond)",
        "test_latents_are_sampled_anew_at_every_visit",
    ),
    (
        "data: the noise of a latent's posterior is the same for all steps",
        'rng.sample.normal("posterior", self.mean.shape[1:])',
        'Rng(rng.seed, 0, rng.batch_size, rng.rows, dtype=rng.dtype).sample.normal("posterior", self.mean.shape[1:])',
        "test_latents_are_sampled_anew_at_every_visit",
    ),
    (
        "data: pictures come with their neighbours' captions",
        "cond = None if self.cond is None else self.cond[rows].to(rng.device)",
        "cond = None if self.cond is None else self.cond[rows.roll(1)].to(rng.device)",
        "test_conditions_stay_with_their_items",
    ),
    (
        "data: a mixture gives the same samples at every step",
        'stream_key(rng.seed, rng.step, "mixture")',
        'stream_key(rng.seed, "mixture")',
        "test_mixtures_are_drawn_anew_at_every_step",
    ),
    (
        "data: a micro-batch of a mixture has the first rows' labels",
        'Cond({"label": label[rng.rows].to(rng.device)}',
        'Cond({"label": label[: rng.rows.stop - rng.rows.start].to(rng.device)}',
        "test_conditions_stay_with_their_items",
    ),
)

TRAINING = (
    planted(
        "training/players.py",
        "training/test_step.py",
        (
            "training: gradients are not clipped",
            "        if self.settings.max_grad_norm > 0:\n"
            "            torch.nn.utils.clip_grads_with_norm_(self.mine, self.settings.max_grad_norm, norm)\n",
            "",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: gradients are clipped by the norm of the step before",
            "self.grad_norm = norm = self._norm()",
            "norm, self.grad_norm = self.grad_norm, self._norm()",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: clipping leaves one tensor as it is",
            "clip_grads_with_norm_(self.mine,",
            "clip_grads_with_norm_(self.mine[1:],",
            "tests/training/test_trainer.py::test_clipping_sees_every_trainable_tensor",
        ),
        (
            "training: the total norm misses a tensor",
            "get_total_norm([row.grad for p, row in pairs if row is p and row.grad is not None])",
            "get_total_norm([row.grad for p, row in pairs[1:] if row is p and row.grad is not None])",
            "tests/training/test_trainer.py::test_clipping_sees_every_trainable_tensor",
        ),
        (
            "training: micro-batches are added, not averaged",
            "total = total / accumulation",
            "pass",
            "tests/methods/test_contract.py::test_accumulation_changes_a_step_by_rounding_only",
        ),
        (
            "training: gradients are never forgotten",
            "self.optimizer.zero_grad(set_to_none=True)",
            "pass",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: a step is made on gradients that are not finite",
            "self.optimizer.found_inf = self.first_bad_step.isfinite().to(torch.float32)",
            "self.optimizer.found_inf = torch.zeros(())",
            "tests/training/test_trainer.py::"
            "test_the_guard_names_step_player_and_checkpoint_and_keeps_the_good_weights",
        ),
        (
            "training: a good step makes a bad one forgotten",
            "torch.where(bad, self.first_bad_step.clamp_max(step), self.first_bad_step)",
            "torch.where(bad, float(step), torch.inf)",
            "tests/training/test_trainer.py::"
            "test_the_guard_names_step_player_and_checkpoint_and_keeps_the_good_weights",
        ),
        (
            "training: the guard names the last bad step",
            "torch.where(bad, self.first_bad_step.clamp_max(step), self.first_bad_step)",
            "torch.where(bad, float(step), self.first_bad_step)",
            "test_the_guard_names_the_first_of_several_bad_steps",
        ),
        (
            "training: the learning rate is that of the step before",
            "self.settings.rate(step, self.player.name)",
            "self.settings.rate(step - 1, self.player.name)",
            "tests/training/test_trainer.py::test_the_optimiser_uses_the_rate_of_its_step",
        ),
        (
            "training: the critic learns at the student's rate",
            "self.settings.rate(step, self.player.name)",
            "self.settings.rate(step)",
            "test_each_player_has_its_own_rate",
        ),
        (
            "training: the gradients of a loss reach other players' weights",
            "total.backward(inputs=inputs, retain_graph=left > 0)\n        for",
            "total.backward(retain_graph=left > 0)\n        for",
            "tests/methods/test_contract.py::test_each_loss_reaches_its_players_parameters_and_nobody_elses",
        ),
    )
    + planted(
        "training/settings.py",
        "training/test_trainer.py",
        (
            "training: warm-up starts at rate 0",
            "return peak * (step + 1) / self.warmup_steps",
            "return peak * step / self.warmup_steps",
            "test_learning_rate_warms_up_then_stays_or_falls_to_zero",
        ),
        (
            "training: the cosine counts from step 0, not from the end of warm-up",
            "done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)",
            "done = step / max(1, self.steps)",
            "test_learning_rate_warms_up_then_stays_or_falls_to_zero",
        ),
        (
            "training: the cosine ends half way down",
            "(1 + math.cos(math.pi * min(1.0, done)))",
            "(1 + math.cos(math.pi / 2 * min(1.0, done)))",
            "test_learning_rate_warms_up_then_stays_or_falls_to_zero",
        ),
    )
    + planted(
        "training/trainer.py",
        "training/test_step.py",
        (
            "training: the average takes the weights from before the step",
            "            player.update(step)\n",
            "            for role in player.player.roles:\n"
            "                self.roles.update_followers(role)\n"
            "            player.update(step)\n"
            "            continue\n",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: the target's average never moves",
            "self.roles.update_followers(role)",
            "pass",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: dropout is the same at every step",
            'stream_key(self.seed, step, "dropout")',
            'stream_key(self.seed, "dropout")',
            "test_dropout_is_keyed_by_seed_and_step",
        ),
        (
            "training: every micro-batch has the first rows",
            "rows = slice(mine.start + i * size, mine.start + (i + 1) * size)",
            "rows = slice(mine.start, mine.start + size)",
            "tests/methods/test_contract.py::test_accumulation_changes_a_step_by_rounding_only",
        ),
        (
            "training: a checkpoint lacks the optimiser",
            'tensors |= {f"optimizer/{player.player.name}/{k}": t for k, t in player.tensors().items()}',
            "pass",
            "tests/training/test_trainer.py::test_logged_losses_after_a_resume_are_those_of_a_whole_run",
        ),
        (
            "training: a checkpoint is written without a look at the guard",
            "        self._guard()\n        tensors = self.tensors()\n",
            "        tensors = self.tensors()\n",
            "test_no_checkpoint_is_written_after_a_bad_step",
        ),
        (
            "training: a method is told that it is always the first step",
            "progress = Progress(step, self.settings.steps, self.stage)",
            "progress = Progress(0, self.settings.steps, self.stage)",
            "test_a_method_is_told_where_it_stands_and_who_is_due",
        ),
        (
            "training: a method prepares for every player, due or not",
            "self.method.prepare(self.roles, batch, draws, names)",
            "self.method.prepare(self.roles, batch, draws, {p.player.name for p in self.players})",
            "test_a_method_is_told_where_it_stands_and_who_is_due",
        ),
        (
            "training: a stopped run does not save what it has done",
            "% settings.checkpoint_every == 0 or last or stop:",
            "% settings.checkpoint_every == 0 or last:",
            "tests/training/test_trainer.py::test_a_stop_request_saves_what_it_reports_and_resumes_to_the_bit",
        ),
        (
            "training: a resumed run forgets what it had spent",
            'self.spent = float(state.get("forward_equivalents", 0))',
            "self.spent = 0",
            "tests/training/test_trainer.py::test_logged_losses_after_a_resume_are_those_of_a_whole_run",
        ),
        (
            "training: bf16 asked for is not turned on",
            "autocast=settings.autocast",
            "autocast=None",
            "test_settings_reach_the_roles",
        ),
        (
            "training: checkpointing asked for is not turned on",
            "gradient_checkpointing=settings.gradient_checkpointing",
            "gradient_checkpointing=False",
            "test_settings_reach_the_roles",
        ),
        (
            "training: hooks are not called after the last step",
            "if self.done % every == 0 or last]",
            "if self.done % every == 0]",
            "test_hooks_run_when_due_and_after_the_last_step",
        ),
    )
    + planted(
        "training/logging.py",
        "training/test_step.py",
        (
            "training: logged losses are sums, not means",
            "means = {name: value / self._counts[key] for (key,",
            "means = {name: value for (key,",
            "test_a_meter_means_over_the_steps_that_gave_a_value",
        ),
        (
            "training: logged losses never start anew",
            "        self.__init__()  # type: ignore[misc]\n",
            "",
            "test_a_meter_means_over_the_steps_that_gave_a_value",
        ),
    )
)

CHECKPOINT = planted(
    "training/checkpoint.py",
    "training/test_checkpoint.py",
    (
        "checkpoint: it is copied into place, not renamed",
        "    os.rename(part, final)\n",
        "    shutil.copytree(part, final)\n",
        "test_files_are_on_disk_before_the_folder_gets_its_name",
    ),
    (
        "checkpoint: the folder's entries are not flushed before the renaming",
        "    sync_folder(part)\n",
        "",
        "test_files_are_on_disk_before_the_folder_gets_its_name",
    ),
    (
        "checkpoint: the renaming is not flushed",
        "    sync_folder(folder)\n    shutil.rmtree(aside",
        "    shutil.rmtree(aside",
        "test_files_are_on_disk_before_the_folder_gets_its_name",
    ),
    (
        "checkpoint: the checkpoint of the same step is deleted where it stands",
        "os.rename(final, aside)",
        "shutil.rmtree(final)",
        "test_whenever_the_process_dies_the_newest_checkpoint_is_whole",
    ),
    (
        "checkpoint: old ones go before the new one is there",
        "    part.mkdir()\n",
        "    part.mkdir()\n    for old in complete(folder)[-1:]:\n        shutil.rmtree(old)\n",
        "test_whenever_the_process_dies_the_newest_checkpoint_is_whole",
    ),
    (
        "checkpoint: one less than asked for is kept",
        "complete(folder)[:-keep]",
        "complete(folder)[: 1 - keep]",
        "test_the_newest_are_kept",
    ),
    (
        "checkpoint: the oldest counts as the newest",
        "return found[-1] if found else None",
        "return found[0] if found else None",
        "test_the_newest_are_kept",
    ),
) + planted(
    "data/files.py",
    "training/test_checkpoint.py",
    (
        "checkpoint: texts are not flushed to disk",
        "        file.flush()\n        os.fsync(file.fileno())",
        "        file.flush()",
        "test_files_are_on_disk_before_the_folder_gets_its_name",
    ),
)

EXPORT = planted(
    "students/student.py",
    "export/test_student.py",
    (
        "export: a LoRA's scale is not part of the file",
        'return {name: t * scale if ".lora_B" in name else t',
        'return {name: t if ".lora_B" in name else t',
        "test_a_lora_answers_as_before_whatever_its_alpha",
    ),
    (
        "export: a LoRA's scale goes into both of its matrices",
        'return {name: t * scale if ".lora_B" in name else t',
        'return {name: t * scale if ".lora_" in name else t',
        "test_a_lora_answers_as_before_whatever_its_alpha",
    ),
    (
        "export: a LoRA that needs embeddings gets the public name",
        'shareable = card.weights == "lora" and not any(name.startswith("extras.") for name in tensors)',
        'shareable = card.weights == "lora"',
        "test_what_only_fewstep_can_read_never_gets_the_public_name",
    ),
    (
        "export: the student is written, whichever role was asked for",
        "tensors = _folded(roles, role) if",
        'tensors = _folded(roles, "student") if',
        "test_a_lora_answers_as_before_whatever_its_alpha",
    ),
    (
        "export: the card's eta is not the sampler's",
        'for key in {"eta", "original_inference_steps"} &',
        'for key in {"original_inference_steps"} &',
        "test_a_card_says_how_to_sample",
    ),
)

EVALUATION = planted(
    "verification/fixed_points.py",
    "verification/test_fixed_points.py",
    (
        "fixed points: CT's noise at the lower time is drawn anew",
        "below = self._look_up(n - 1, of_x * x[:, None, None] + of_x0 * x0)",
        "below = self._look_up(n - 1, float(self.alpha[n - 1]) * x0)",
        "test_ct_is_the_conditional_mean",
    ),
    (
        "fixed points: CT's clean data lie at their mean",
        "* sigma * self.nodes",
        "* 0 * self.nodes",
        "test_ct_is_the_conditional_mean",
    ),
    (
        "fixed points: CD walks by DDIM whatever its solver",
        "cond, self.guidance_scale, self.solver)",
        'cond, self.guidance_scale, "ddim")',
        "test_cd_answers_with_heun_steps_composed",
    ),
    (
        "fixed points: TCD's secants are weighted by b, not by its square",
        "weight = of_mine / (of_mine**2).sum()",
        "weight = np.sign(of_mine) / np.abs(of_mine).sum()",
        "test_tcd_figures[50 hops]",
    ),
    (
        "fixed points: TCD never ends where the teacher landed",
        "for s in self.ends if floor <= s < m]",
        "for s in self.ends if floor <= s < max(m - 1, 1)]",
        "test_tcd_is_the_least_squares_table",
    ),
    (
        "fixed points: LCM's teacher walks from a grid time too low",
        "for m in range(n, 0, -1):",
        "for m in range(n - 1, 0, -1):",
        "test_lcm_answers_with_the_composed_teacher",
    ),
)

MEASURED = [
    *planted(
        "evaluation/metrics.py",
        "evaluation/test_measured.py",
        (
            "metrics: resampled groups all count once",
            'squares = torch.einsum("g,gij->ij", weights, self.squares)',
            "squares = self.squares.sum(dim=0)",
            "test_groups_have_the_moments_of_their_samples",
        ),
        (
            "metrics: a picture's distance to itself counts in the spread",
            "per_prompt * (per_prompt - 1)",
            "per_prompt * per_prompt",
            "test_spread_against_loops",
        ),
    ),
    *planted(
        "evaluation/measured.py",
        "evaluation/test_measured.py",
        (
            "measured: the gap is divided by the student's distance",
            "return (few - student) / (few - many)",
            "return (few - student) / (few - 0 * many)",
            "test_the_gap_is_closed_by_the_teacher_itself_and_not_by_a_copy",
        ),
    ),
    *planted(
        "scenes64/linear_code.py",
        "scenes64/test_linear_code.py",
        (
            "latents: details are scaled up nearly to the colours' variance",
            "scale = variances.pow(-0.25)",
            "scale = variances.pow(-0.4)",
            "test_it_explains_more_than_other_projections",
        ),
        (
            "latents: the code takes the least components",
            "variances.flip(0)[:channels], vectors.flip(1)[:, :channels]",
            "variances[:channels], vectors[:, :channels]",
            "test_it_explains_more_than_other_projections",
        ),
    ),
    *planted(
        "scenes64/teacher_stages.py",
        "scenes64/test_train_teacher.py",
        (
            "teacher: the second task does not fade",
            "share = self.telling * (1 - rng.step / self.settings.steps)",
            "share = self.telling",
            "test_the_second_task_is_told_from_inside_and_fades",
        ),
        (
            "teacher: the decoder draws from what the encoder gives",
            "self.vae.decode(latents + spread",
            "self.vae.decode(posterior.mean + spread",
            "test_the_encoder_is_taught_the_code_and_the_decoder_draws_from_it",
        ),
    ),
    *planted(
        "training/distributed.py",
        "scenes64/test_train_teacher.py",
        (
            "processes: only the first one's gradients count",
            "dist.all_reduce(flat)",
            "dist.broadcast(flat, src=0)",
            "test_two_processes_train_as_one",
        ),
    ),
]

CATALOGUE: list[Mutant] = [
    *SCHEDULE,
    *PREDICTION,
    *CONSISTENCY,
    *MIXTURE,
    *FLOW_MAP,
    *DENOISER,
    *ROLES,
    *NETWORKS,
    *SAMPLING,
    *METHODS,
    *RANDOM,
    *DATA,
    *TRAINING,
    *CHECKPOINT,
    *EXPORT,
    *EVALUATION,
    *MEASURED,
    *PROCESSES,
    *OPTIMIZERS,
    *STAGES,
    *BENCHMARK,
    *PLAN,
    *EIGHT_BITS,
    *PCM,
    *DISCRIMINATORS,
    *DIAGNOSIS,
    *CTM,
    *DMD,
    *PAIRS,
    *DMD2,
    *LIGHTNING,
    *HYPER,
    *TURBO,
    *INPUTS,
    *PROJECTION,
    *AUGMENT,
    *HELPERS,
    *LADD,
    *FEEDBACK,
    *FAMILIES,
    *PICTURES,
    *EXPORTS,
    *USE,
    *PUBLISHED,
]
