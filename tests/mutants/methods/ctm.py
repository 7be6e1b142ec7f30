"""Planted defects of the method ctm."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/ctm.py",
        "methods/test_ctm.py",
        (
            "ctm: the outer map carries no gradient to its input",
            "return with_gradient(loss, shared.x_s, grad)",
            "return with_gradient(loss, shared.x_s, torch.ones_like(grad))",
            "test_the_gradient_passes_through_the_outer_map_to_its_input_only[edm-0.0]",
        ),
        (
            "ctm: the student's landing is compared as it is, not carried to the end",
            "x_est = self._to_end(roles, x_s_leaf, s, batch.cond)",
            "x_est = x_s_leaf + 0",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: the outer map's own weights learn",
            ("retain_graph=self.gan is not None)\n        return with_gradient(loss, shared.x_s, grad)"),
            ("retain_graph=True)\n        return with_gradient(loss, shared.x_s, grad) + loss - loss.detach()"),
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
            "below = roles.student(step.x_u",
            "below = roles.target(step.x_u",
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
            "x_s = roles.student(step.x_t, step.t, batch.cond, end=s)",
            "x_s = roles.student(step.x_t, step.t, batch.cond, end=step.u)",
            "test_both_players_steps_are_the_papers[edm-sample-heun-full-True]",
        ),
        (
            "ctm: from the landing the target jumps as if still at t",
            "roles.student(step.x_u, step.u, batch.cond, end=s)",
            "roles.student(step.x_u, step.t, batch.cond, end=s)",
            "test_jumps_that_end_where_they_start_are_the_identity_to_the_bit",
        ),
        (
            "ctm: the teacher goes one hop only",
            "times = [self.grid[draws.index - k] for k in range(draws.num_steps + 1)]",
            "times = [self.grid[draws.index], self.grid[draws.index - draws.num_steps]]",
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
            'rng.sample.integers("index", num_steps, last + 1)',
            'rng.sample.integers("index", num_steps, last)',
            "test_draws_cover_every_start_and_every_end_below_the_landing",
        ),
        (
            "ctm: jumps never end where the teacher landed",
            '(rng.sample.uniform("end") * (index - num_steps + 1))',
            '(rng.sample.uniform("end") * (index - num_steps))',
            "test_draws_cover_every_start_and_every_end_below_the_landing",
        ),
        (
            "ctm: on the diagonal the student is told the grid's end",
            "pred = roles.student(x, t, batch.cond, end=t).x0",
            "pred = roles.student(x, t, batch.cond, end=self.end).x0",
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
            "self.gan.player_loss(roles, shared.real, shared.fake)",
            "self.gan.player_loss(roles, shared.fake, shared.real)",
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
]
