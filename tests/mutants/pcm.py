"""Planted defects of PCM and of the discriminators it shares."""

from tests.mutants.mutant import planted

PCM = planted(
    "methods/pcm.py",
    "methods/test_pcm.py",
    (
        "pcm: the target keeps its graph",
        "        with torch.no_grad():\n            target = roles.target(",
        "        if True:\n            target = roles.target(",
        "test_no_gradient_flows_through_the_target",
    ),
    (
        "pcm: the target is asked at t, not where the teacher landed",
        "target = roles.target(hop.x_u, u, batch.cond)",
        "target = roles.target(hop.x_u, t, batch.cond)",
        "test_landing_on_an_edge_the_target_is_the_teachers_point_to_the_bit",
    ),
    (
        "pcm: the target's edge is that of its own time, a phase too low on an edge",
        "roles.target(hop.x_u, u, batch.cond).at(edge)",
        "roles.target(hop.x_u, u, batch.cond).at(self.edges[self.phase[(draws.index - 1).clamp_min(0)]])",
        "test_landing_on_an_edge_the_target_is_the_teachers_point_to_the_bit",
    ),
    (
        "pcm: a time on an edge belongs to the phase above it",
        'np.searchsorted(edges, grid[:-1], side="right") - 1',
        'np.minimum(np.searchsorted(edges, grid[1:], side="right") - 1, len(edges) - 2)',
        "test_edges_and_the_phase_of_every_hop",
    ),
    (
        "pcm: the student jumps to where the teacher landed",
        "answer = said.at(edge)",
        "answer = said.at(u)",
        "test_both_players_steps_are_the_papers",
    ),
    (
        "pcm: the target is the student, not what trails it",
        "target = roles.target(hop.x_u",
        "target = roles.student(hop.x_u",
        "test_both_players_steps_are_the_papers[vp-epsilon-drawn scale, lagging-full]",
    ),
    (
        "pcm: the teacher answers in the student's place",
        "said = roles.student(hop.x_t",
        "said = roles.teacher(hop.x_t",
        "test_both_players_steps_are_the_papers",
    ),
    (
        "pcm: a and b are noised alike",
        "renoise(self.schedule, target, edge, noised, draws.real_noise)",
        "renoise(self.schedule, target, edge, noised, draws.fake_noise)",
        "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
    ),
    (
        "pcm: the answers are noised as if they were clean",
        "renoise(self.schedule, answer, edge, noised, draws.fake_noise)",
        "self.schedule.add_noise(answer, draws.fake_noise, noised)",
        "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
    ),
    (
        "pcm: the teacher sees the noised answer at the edge's time",
        "shared.fake = self.game.features(roles, fake, noised, batch.cond)",
        "shared.fake = self.game.features(roles, fake, edge, batch.cond)",
        "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
    ),
    (
        "pcm: no gradient reaches the student through the discriminator",
        "fake = renoise(self.schedule, answer, edge",
        "fake = renoise(self.schedule, answer.detach(), edge",
        "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
    ),
    (
        "pcm: the real side keeps the captions that were dropped",
        "shared.real = self.game.features(roles, real, noised, batch.cond)",
        "shared.real = self.game.features(roles, real, noised, None if batch.cond is None else batch.cond[:1])",
        "test_both_players_steps_are_the_papers[vp-epsilon-normal-cfg-full]",
    ),
    (
        "pcm: real and fake change places",
        "self.game.judge(roles, shared.real, shared.fake)",
        "self.game.judge(roles, shared.fake, shared.real)",
        "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
    ),
    (
        "pcm: the student is pleased to be found out",
        "total = loss + self.settings.adversarial_weight * adversarial",
        "total = loss - self.settings.adversarial_weight * adversarial",
        "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
    ),
    (
        "pcm: noised times reach past the phase",
        "low, high = self.edges[phase], self.edges[phase + 1]",
        "low, high = self.edges[phase], self.edges[phase + 1] + 1",
        "test_draws_cover_every_hop_and_every_height",
    ),
    (
        "pcm: flow and EDM times are even in the phase, not over its hops",
        'if self.schedule.family == "vp":',
        "if True:",
        "test_noised_times_elsewhere_are_even_over_the_hops",
    ),
    (
        "pcm: captions are kept as often as they should be dropped",
        'rng.sample.uniform("caption") < dropout if dropout else None',
        'rng.sample.uniform("caption") >= dropout if dropout else None',
        "test_captions_are_dropped_as_often_as_asked",
    ),
    (
        "pcm: students are sampled in four steps whatever their phases",
        "return Sampling(settings.num_phases, guidance",
        "return Sampling(4, guidance",
        "test_students_want_as_many_steps_as_phases_and_guidance_only_if_they_were_trained_without",
    ),
    (
        "pcm: its edges are handed to a sampler that steps elsewhere",
        'sampler = "phased"',
        'sampler = "tcd"',
        "tests/verification/test_fixed_points.py::test_the_card_of_a_pcm_student_leads_to_its_training_edges",
    ),
)

DISCRIMINATORS = [
    *planted(
        "methods/parts/discriminators.py",
        "methods/test_discriminators.py",
        (
            "discriminators: their loss trains the student",
            "[feature.detach() for feature in fake]",
            "fake",
            "tests/methods/test_pcm.py::test_no_graph_leads_from_the_discriminators_loss_to_the_student",
        ),
        (
            "discriminators: real and fake change places",
            "discriminator_loss(real, fake, kind), stats=stats",
            "discriminator_loss(fake, real, kind), stats=stats",
            "tests/methods/test_pcm.py::test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "discriminators: hinge has its signs reversed",
            "F.relu(1 - r).mean() + F.relu(1 + f).mean()",
            "F.relu(1 + r).mean() + F.relu(1 - f).mean()",
            "test_a_logit_above_zero_means_real[hinge]",
        ),
        (
            "discriminators: logistic has its signs reversed",
            "F.softplus(-r).mean() + F.softplus(f).mean()",
            "F.softplus(r).mean() + F.softplus(-f).mean()",
            "test_the_best_logistic_discriminator_is_the_log_ratio",
        ),
        (
            "discriminators: hinge has no margin",
            "F.relu(1 - r).mean()",
            "F.relu(-r).mean()",
            "test_the_best_hinge_discriminator_is_the_sign",
        ),
        (
            "discriminators: the generator minimises its logit",
            '(-f if kind == "hinge"',
            '(f if kind == "hinge"',
            "test_generators_slopes_at_the_best_discriminator",
        ),
        (
            "discriminators: the generator's logistic loss saturates",
            "else F.softplus(-f)).mean()",
            "else -F.softplus(f)).mean()",
            "test_softplus_is_not_saturating",
        ),
        (
            "discriminators: heads are summed, not averaged",
            "return torch.stack(list(terms)).mean()",
            "return torch.stack(list(terms)).sum()",
            "test_every_head_counts_alike_however_large_its_map",
        ),
        (
            "discriminators: R1 takes the norm, not its square",
            "slope.flatten(1).square().sum(dim=1).mean()",
            "slope.flatten(1).norm(dim=1).mean()",
            "test_r1_of_linear_heads_is_the_square_of_their_weights",
        ),
        (
            "discriminators: R1 trains nobody",
            "torch.autograd.grad(total, leaves, create_graph=True)",
            "torch.autograd.grad(total, leaves)",
            "test_r1_of_linear_heads_is_the_square_of_their_weights",
        ),
        (
            "discriminators: R1 reaches the backbone",
            "leaves = [feature.detach().requires_grad_() for feature in features]",
            "leaves = [feature if feature.requires_grad else feature.requires_grad_() for feature in features]",
            "test_r1_stops_at_the_heads_inputs_and_is_their_slope",
        ),
    ),
    *planted(
        "methods/parts/heads.py",
        "methods/test_discriminators.py",
        (
            "discriminators: the second block has no shortcut",
            "h = h + self.middle(h)",
            "h = self.middle(h)",
            "tests/methods/test_pcm.py::test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "discriminators: heads compute in half precision",
            "head(feature.to(next(head.parameters()).dtype))",
            "head.to(feature.dtype)(feature)",
            "test_heads_compute_in_their_own_precision",
        ),
        (
            "discriminators: groups of one channel say nothing of vectors",
            "width % g == 0 and width // g >= 4)",
            "width % g == 0)",
            "test_a_head_has_one_logit_a_position_and_treats_samples_apart",
        ),
        (
            "discriminators: a conv head halves nothing",
            "for _ in range(halvings)",
            "for _ in range(0)",
            "test_a_conv_head_leads_down_to_one_logit_and_treats_samples_apart",
        ),
        (
            "discriminators: a conv head cuts what does not divide",
            "(0, -h.shape[-1] % side, 0, -h.shape[-2] % side)",
            "(0, 0, 0, 0)",
            "test_a_conv_head_leads_down_to_one_logit_and_treats_samples_apart",
        ),
        (
            "discriminators: a conv head skips places",
            "padding=1 if stride == 2 else 0",
            "padding=1 if stride == 2 else 0, dilation=2 if stride == 2 else 1",
            "test_a_conv_head_sees_every_place",
        ),
    ),
    *planted(
        "models/families/network.py",
        "models/test_features.py",
        (
            "features: the UNet's decoder runs for nothing",
            "                leave()\n",
            "                pass\n",
            "test_nothing_after_the_last_tap_is_run",
        ),
        (
            "features: the blocks are watched for ever",
            "        for handle in handles:\n            handle.remove()",
            "        pass",
            "test_nothing_after_the_last_tap_is_run",
        ),
        (
            "features: they carry no gradient to the picture",
            "found[tap] = output[place] if isinstance(output, tuple) else output",
            "found[tap] = (output[place] if isinstance(output, tuple) else output).detach()",
            "test_the_gradient_reaches_the_student_through_the_frozen_teacher",
        ),
    ),
    *planted(
        "models/denoiser.py",
        "models/test_features.py",
        (
            "features: they count as a whole network",
            "self._count(x.shape[0] / 2, any(",
            "self._count(x.shape[0], any(",
            "test_features_count_half_and_their_graph_as_any",
        ),
        (
            "features: an EDM network's are taken at the unscaled picture",
            "network.features(*self._inputs(working(x), self._coefficients(host(t))[2], t), cond, taps)",
            "network.features(working(x), self._inputs(x, self._coefficients(host(t))[2], t)[1], cond, taps)",
            "test_a_preconditioned_networks_features_are_the_raw_ones_at_its_own_inputs",
        ),
    ),
    *planted(
        "models/mlp.py",
        "models/test_features.py",
        (
            "features: an MLP's are what goes into a block",
            'h = found[f"block{i}"] = self._through(block, h)',
            'found[f"block{i}"], h = h, self._through(block, h)',
            "test_an_mlps_features_are_its_blocks_outputs",
        ),
    ),
    *planted(
        "models/roles.py",
        "models/test_features.py",
        (
            "roles: heads are not saved",
            "self.heads[name], self._tensors[name] = heads, dict(heads.named_parameters())",
            "self.heads[name], self._tensors[name] = heads, {}",
            "test_heads_are_trained_saved_and_restored_like_a_role",
        ),
        (
            "roles: heads are held in the base's half precision",
            "heads.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))",
            "heads.to(device=like.device, dtype=like.dtype)",
            "test_heads_stay_in_float32_over_a_half_precision_base",
        ),
    ),
    *planted(
        "training/players.py",
        "training/test_trainer.py",
        (
            "training: critics take the student's betas",
            'settings.betas if player.name == "student" else settings.critic_betas or settings.betas',
            "settings.betas",
            "test_critics_may_have_betas_of_their_own",
        ),
    ),
    *planted(
        "verification/fixed_points.py",
        "verification/test_fixed_points.py",
        (
            "fixed points: PCM's hops that land on an edge go on to the one below",
            "edge = int(self.lower[self.lower < n].max())",
            "edge = int(self.lower[self.lower < max(n, 2) - 1].max(initial=0))",
            "test_pcm_is_the_table_of_edge_points",
        ),
    ),
    *planted(
        "recipe/schema.py",
        "runs/test_distill_pcm.py",
        (
            "recipe: a method's own sampling is forgotten",
            'update={"sample": recipe.sample.model_copy(update=own)}',
            'update={"sample": recipe.sample}',
            "test_what_a_recipe_leaves_out_is_the_methods_own",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_distill_pcm.py",
        (
            "distill: the card forgets the guidance that a student was left with",
            "guidance_scale=wanted.guidance_scale,",
            "",
            "test_normal_cfg_students_keep_their_guidance",
        ),
    ),
]
