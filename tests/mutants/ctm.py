"""Planted defects of CTM and of terms that are balanced by their gradients."""

from tests.mutants.mutant import planted

CTM = [
    *planted(
        "methods/ctm.py",
        "methods/test_ctm.py",
        (
            "ctm: the outer map carries no gradient to its input",
            "return with_gradient(loss, shared.landing, pull)",
            "return with_gradient(loss, shared.landing, torch.ones_like(pull))",
            "test_the_gradient_passes_through_the_outer_map_to_its_input_only[edm-0.0]",
        ),
        (
            "ctm: the student's landing is compared as it is, not carried to the end",
            "answer = self._to_end(roles, x_s, s, batch.cond)",
            "answer = x_s + 0",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: the outer map's own weights learn",
            "retain_graph=self.game is not None)\n        return with_gradient(loss, shared.landing, pull)",
            "retain_graph=True)\n        return with_gradient(loss, shared.landing, pull) + loss - loss.detach()",
            "test_the_gradient_passes_through_the_outer_map_to_its_input_only[edm-0.0]",
        ),
        (
            "ctm: the target is not carried to the end",
            "            target = self._to_end(roles, below, s, batch.cond)",
            "            target = below",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: the lagging target makes the inner jump too",
            "below = roles.student(hop.x_u",
            "below = roles.target(hop.x_u",
            "test_both_players_steps_are_the_papers[edm-sample-lagging, a game-full-True]",
        ),
        (
            "ctm: the outer map is the live student",
            "return roles.target(x, s, cond, end=self.end).at(self.end)",
            "return roles.student(x, s, cond, end=self.end).at(self.end)",
            "test_both_players_steps_are_the_papers[edm-sample-lagging, a game-full-True]",
        ),
        (
            "ctm: the student is not told where the outer jump ends",
            "return roles.target(x, s, cond, end=self.end)",
            "return roles.target(x, s, cond, end=s)",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: the student is told where the teacher landed",
            "landing = roles.student(hop.x_t, hop.t, batch.cond, end=s)",
            "landing = roles.student(hop.x_t, hop.t, batch.cond, end=hop.u)",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: from the landing the target jumps as if still at t",
            "roles.student(hop.x_u, hop.u, batch.cond, end=s)",
            "roles.student(hop.x_u, hop.t, batch.cond, end=s)",
            "test_jumps_that_end_where_they_start_are_the_identity_to_the_bit",
        ),
        (
            "ctm: the teacher goes one hop only",
            "times = [self.grid[draws.index - k] for k in range(draws.hops + 1)]",
            "times = [self.grid[draws.index], self.grid[draws.index - draws.hops]]",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: all numbers of hops are equally likely",
            '1 + rng.shared.choice("hops", range(1, self.settings.max_hops + 1))',
            'rng.shared.integer("hops", 1, self.settings.max_hops + 1)',
            "test_hops_are_one_for_the_batch_in_proportion_to_their_number",
        ),
        (
            "ctm: the grid's start is never drawn",
            'rng.sample.integers("index", hops, last + 1)',
            'rng.sample.integers("index", hops, last)',
            "test_draws_cover_every_start_and_every_end_below_the_landing",
        ),
        (
            "ctm: jumps never end where the teacher landed",
            '(rng.sample.uniform("end") * (index - hops + 1))',
            '(rng.sample.uniform("end") * (index - hops))',
            "test_draws_cover_every_start_and_every_end_below_the_landing",
        ),
        (
            "ctm: on the diagonal the student is told the grid's end",
            "said = roles.student(x, t, batch.cond, end=t).x0",
            "said = roles.student(x, t, batch.cond, end=self.end).x0",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: behind a guided teacher the diagonal learns the unguided one",
            "            if self.guided:\n",
            "            if False:\n",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full-True]",
        ),
        (
            "ctm: the diagonal is weighted by 1",
            '"l2", weight=self._denoising_weight(t))',
            '"l2")',
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: latents' standard deviation is taken for that of EDM's pixels",
            '0.5 if self.schedule.family == "edm" else 1.0',
            "0.5",
            "test_the_diagonals_weight_is_edms_and_the_v_loss_elsewhere",
        ),
        (
            "ctm: the diagonal is trained at low noise instead of high",
            "self._time_at(1 - TOP * height)",
            "self._time_at(TOP * height)",
            "test_the_diagonal_is_trained_where_edm_is_and_at_high_noise",
        ),
        (
            "ctm: data is noised to be judged as if it lived at the grid's end",
            "real = self.schedule.add_noise(batch.x0, draws.real_noise, tau)",
            "real = renoise(self.schedule, batch.x0, self.end, tau, draws.real_noise)",
            "test_both_players_steps_are_the_papers[vp-epsilon-lagging, a game-full-True]",
        ),
        (
            "ctm: real and fake change places",
            "self.game.judge(roles, shared.real, shared.fake)",
            "self.game.judge(roles, shared.fake, shared.real)",
            "test_both_players_steps_are_the_papers[vp-epsilon-lagging, a game-full-True]",
        ),
        (
            "ctm: the student plays from the first step",
            "and shared.fake is not None and draws.playing:",
            "and shared.fake is not None:",
            "test_until_its_start_the_game_does_not_move_the_student",
        ),
        (
            "ctm: the mean number of hops is that of equal chances",
            "self._calls((2 * self.settings.max_hops + 1) / 3)",
            "self._calls((self.settings.max_hops + 1) / 2)",
            "tests/methods/test_contract.py::test_calls_per_step_are_the_mean_over_steps[ctm]",
        ),
    ),
    *planted(
        "methods/parts/hops.py",
        "methods/test_ctm.py",
        (
            "ctm: every hop of the teacher starts anew at t",
            "            first = teacher(x, t, batch.cond",
            "            first = teacher(x_t, t, batch.cond",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
    ),
    *planted(
        "models/roles.py",
        "methods/test_ctm.py",
        (
            "roles: the probe is a UNet's middle",
            'sorted(last, key=lambda key: "mid_block" not in key)[-1]',
            "last[-1]",
            "test_the_probe_is_the_last_weight_that_is_no_extra_inputs",
        ),
        (
            "roles: the probe is a LoRA's A, whose gradient is 0 at the start",
            'if p.ndim > 1 and ".lora_A" not in key]',
            'if p.ndim > 1 and ".lora_B" not in key]',
            "test_the_probe_is_the_last_weight_that_is_no_extra_inputs",
        ),
    ),
    *planted(
        "training/players.py",
        "methods/test_ctm.py",
        (
            "balance: a term is weighed by its own pull over the total's",
            "ratio = self._pull(of_total) / (self._pull(of_term) + 1e-4)",
            "ratio = self._pull(of_term) / (self._pull(of_total) + 1e-4)",
            "test_terms_are_weighted_by_their_pull_at_the_last_weight[heun-full]",
        ),
        (
            "balance: the weight has no bounds",
            "balance.scale * ratio.clamp(balance.low, balance.high)",
            "balance.scale * ratio",
            "test_balanced_terms_add_up_over_micro_batches_before_they_are_weighed",
        ),
        (
            "balance: only the last micro-batch's term counts",
            "self._exchange(self._terms[name][1] if name in self._terms else [None] * len(self.parameters))",
            "self._exchange([None] * len(self.parameters))",
            "test_balanced_terms_add_up_over_micro_batches_before_they_are_weighed",
        ),
        (
            "balance: terms are not divided among micro-batches",
            "(balance.term / accumulation).backward(",
            "balance.term.backward(",
            "test_balanced_terms_add_up_over_micro_batches_before_they_are_weighed",
        ),
        (
            "balance: a weight that the total does not reach is left out",
            "weight * b if a is None else a + weight * b",
            "a if a is None else a + weight * b",
            "test_a_term_alone_may_reach_a_weight",
        ),
    ),
    *planted(
        "verification/fixed_points.py",
        "verification/test_verify.py",
        (
            "fixed points: CTM's trajectories stop one hop early",
            "for n in range(start, last, -1):",
            "for n in range(start, last + (start > last + 1), -1):",
            "test_ctms_contract_and_table_hold_on_every_schedule",
        ),
    ),
]
