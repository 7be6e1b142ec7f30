"""Planted defects of sampling."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
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
            "sampling: LCM's student is conditioned on the next time",
            ("        return float(schedule.end)\n\n    def step(self, at: Step) -> Tensor:\n        x0, schedule"),
            ("        return next_time\n\n    def step(self, at: Step) -> Tensor:\n        x0, schedule"),
            "test_a_student_of_lcm_is_conditioned_on_the_schedules_end",
        ),
        (
            "sampling: LCM re-noises after its last step too",
            ("        if at.last:\n            return x0"),
            ("        if False:\n            return x0"),
            "test_the_last_step_draws_nothing",
        ),
        (
            "sampling: TCD re-noises after its last step too",
            (
                "            return float(max(math.floor(s + 1e-9), next_time if last else 0))\n"
                "        return max(s, float(next_time if last else schedule.end))\n"
                "\n"
                "    def step(self, at: Step) -> Tensor:\n"
                "        s = self.end(at.schedule, at.time, at.next, at.last)\n"
                "        x = at.prediction.at(s)\n"
                "        if at.last or self.eta == 0:"
            ),
            (
                "            return float(max(math.floor(s + 1e-9), next_time if last else 0))\n"
                "        return max(s, float(next_time if last else schedule.end))\n"
                "\n"
                "    def step(self, at: Step) -> Tensor:\n"
                "        s = self.end(at.schedule, at.time, at.next, at.last)\n"
                "        x = at.prediction.at(s)\n"
                "        if self.eta == 0:"
            ),
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
            "math.sqrt(1 - self.eta**2) * (schedule.noise_to_signal(next_time) - lowest) + lowest",
            "math.sqrt(1 - self.eta**2) * schedule.noise_to_signal(next_time)",
            "test_ctm_on_edm_is_the_official_gamma_sampler",
        ),
        (
            "sampling: CTM's gamma scales the level by 1 - gamma",
            "math.sqrt(1 - self.eta**2) * (schedule.noise_to_signal(next_time) - lowest) + lowest",
            "(1 - self.eta) * (schedule.noise_to_signal(next_time) - lowest) + lowest",
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
            (
                "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[euler-ancestral-ep"
                "silon-4]"
            ),
        ),
        (
            "sampling: the ancestral step keeps sigma - std of the noise",
            "np.sqrt(sigma**2 - std**2)",
            "sigma - std",
            (
                "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[euler-ancestral-ep"
                "silon-4]"
            ),
        ),
        (
            "sampling: DDIM's eta is all or nothing",
            "std = np.asarray(eta * sigma * np.sqrt(",
            "std = np.asarray(sigma * np.sqrt(",
            (
                "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[ddim, leading, as "
                "Stable Diffusion-epsilon-4]"
            ),
        ),
        (
            "sampling: Heun's second slope is taken at the first time",
            "second = at.ask(jump, at.next)",
            "second = at.ask(jump, at.time)",
            "test_heun_on_edm_is_algorithm_1",
        ),
        (
            "sampling: Heun adds its slopes instead of averaging them",
            "half = np.asarray(scale * (schedule.solver_level(second.t) - level_t) / 2)",
            "half = np.asarray(scale * (schedule.solver_level(second.t) - level_t))",
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
            "first.slope + second.combine(*schedule.slope_mix, euler)",
            "first.slope + first.slope",
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
            (
                "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[dpm++ 2M, leading,"
                " to sigma_min-epsilon-4]"
            ),
        ),
        (
            "sampling: DPM-Solver++'s leading grid has a point too few",
            "(total // (n + 1))",
            "((total - 1) // n)",
            (
                "tests/sampling/test_parity.py::test_a_sampler_is_that_of_diffusers_in_float64[dpm++ 2M, leading,"
                " to sigma_min-epsilon-4]"
            ),
        ),
        (
            "strength: the first steps are left",
            "return times[-count:]",
            "return times[:count]",
            "tests/sampling/test_strength.py::test_other_grids_are_cut",
        ),
        (
            "strength: flow grids are rounded down",
            'math.ceil(wanted - 1e-9) if schedule.family == "flow" else math.floor(wanted + 1e-9)',
            "math.floor(wanted + 1e-9)",
            "tests/sampling/test_strength.py::test_other_grids_are_cut",
        ),
        (
            "strength: LCM's own grid is cut too",
            "if self.strength == 1 or (",
            "if self.strength == 1 or False and (",
            "tests/sampling/test_strength.py::test_lcms_times_are_built_from_the_strength",
        ),
        (
            "export: students that re-noise have no scheduler",
            "if times[-2] >= 100 else iter(())",
            "if times[-2] < 0 else iter(())",
            "tests/export/test_scheduler.py::test_what_is_saved_steps_like_us[dmd2-epsilon]",
        ),
        (
            "export: what re-noises on a flow model jumps on",
            (
                "if times[-2] >= 100 else iter(())\n\n    def flow_scheduler(self) -> str:\n"
                '        return "FlowMatchLCMScheduler"'
            ),
            (
                "if times[-2] >= 100 else iter(())\n\n    def flow_scheduler(self) -> str:\n"
                '        return "FlowMatchEulerDiscreteScheduler"'
            ),
            "tests/export/test_scheduler.py::test_flow_samplers_step_like_us",
        ),
        (
            "export: TCD's eta is left to the pipeline",
            'call = {"eta": self.eta}',
            "call: dict[str, Any] = {}",
            "tests/export/test_scheduler.py::test_what_is_saved_steps_like_us[tcd-epsilon]",
        ),
    ),
    *planted(
        "sampling/diffusers_schedulers.py",
        "export/test_scheduler.py",
        (
            "export: diffusers' DDIM at three steps",
            "if 1000 % (len(times) - 1) == 0:",
            "if True:",
            "test_what_is_saved_steps_like_us[ddim 3-epsilon]",
        ),
        (
            "export: phases end at clean data",
            '"final_sigmas_type": last',
            '"final_sigmas_type": "zero"',
            "test_what_is_saved_steps_like_us[phased 4-epsilon]",
        ),
    ),
    *planted(
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
            "sampling: a student is conditioned on the next time, not on the sampler's target time",
            "end = max(sampler.end(schedule, time, next_time, last), denoiser.lowest_end) if conditioned else None",
            "end = max(next_time, denoiser.lowest_end) if conditioned else None",
            "test_a_student_is_conditioned_on_its_target_time_and_guidance",
        ),
        (
            "sampling: a student is conditioned on an end that no method trains",
            "end = max(sampler.end(schedule, time, next_time, last), denoiser.lowest_end) if conditioned else None",
            "end = sampler.end(schedule, time, next_time, last) if conditioned else None",
            "tests/methods/test_ends.py::test_the_ends_of_sampling_are_those_of_training[flowmap-vp]",
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
        (
            "sampling: cut short, a way ends as if it were whole",
            "last = i == len(times) - 2",
            "last = i == (len(times) - 2 if until is None else until - 1)",
            "tests/methods/test_feedback.py::test_the_way_to_each_exit_is_the_samplers_own[vp-tcd]",
        ),
        (
            "strength: the picture gets the second time's noise",
            "schedule.add_noise(image.to(noise), noise, float(times[0]))",
            "schedule.add_noise(image.to(noise), noise, float(times[1]))",
            "tests/sampling/test_strength.py::test_steps_of_lcm_are_posterior_means_and_the_last_adds_no_noise",
        ),
        (
            "inpainting: the mask is read the wrong way round",
            "return (1 - self.mask) * known.to(x.dtype) + self.mask * x",
            "return self.mask * known.to(x.dtype) + (1 - self.mask) * x",
            "tests/sampling/test_strength.py::test_inpainting_keeps_the_picture_and_draws_the_rest_as_if_alone",
        ),
        (
            "inpainting: what is kept stays noisy at the end",
            "self.image if last",
            "self.image if False",
            "tests/sampling/test_strength.py::test_inpainting_keeps_the_picture_and_draws_the_rest_as_if_alone",
        ),
        (
            "inpainting: what is kept is put back without noise",
            "schedule.add_noise(self.image, self.noise, time)",
            "self.image",
            "tests/sampling/test_strength.py::test_inpainting_keeps_the_picture_and_draws_the_rest_as_if_alone",
        ),
    ),
    *planted(
        "sampling/solvers.py",
        "sampling/test_truth.py",
        (
            "sampling: the teacher's solver is not guided",
            "_no_noise, cond, guidance_scale)",
            "_no_noise, cond)",
            "test_every_step_is_guided",
        ),
    ),
    *planted(
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
    ),
    *planted(
        "sampling/sample.py",
        "cases/test_sampling.py",
        (
            "sampling: the first generator draws for all images",
            "torch.cat([unit_normal((1, *shape[1:]), one, dtype, device) for one in generator])",
            "unit_normal(shape, generator[0], dtype, device)",
            "test_an_image_with_its_own_generator_does_not_depend_on_the_batch[lcm]",
        ),
    ),
]
