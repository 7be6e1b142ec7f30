"""Planted defects of the method hyper."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/hyper.py",
        "methods/test_hyper.py",
        (
            "hyper: a segment's floor is the paper's, by which every boundary is its own",
            "(torch.ceil(n / self.stride).to(torch.int64) - 1) * self.stride",
            "torch.floor(n / self.stride).to(torch.int64) * self.stride",
            "test_no_boundary_is_its_own_floor",
        ),
        (
            "hyper: segments begin one hop too low",
            ("        n = index + 1\n        return"),
            ("        n = index\n        return"),
            "test_no_boundary_is_its_own_floor",
        ),
        (
            "hyper: all segments end where the lowest does",
            "floor + (rng.sample.uniform",
            "0 * floor + (rng.sample.uniform",
            "test_draws_cover_every_hop_and_every_end_of_its_segment",
        ),
        (
            "hyper: ends lie above where the hop lands",
            "* (index + 1 - floor)).to(torch.int64)",
            "* (index + 2 - floor)).to(torch.int64)",
            "test_draws_cover_every_hop_and_every_end_of_its_segment",
        ),
        (
            "hyper: no end is where the hop lands",
            "* (index + 1 - floor)).to(torch.int64)",
            "* (index - floor)).to(torch.int64)",
            "tests/verification/test_verify.py::test_hypers_segments_and_fixed_points_hold_on_every_schedule[vp]",
        ),
        (
            "hyper: the target lags behind nothing",
            'RoleSpec("target", follows="student", decay=self.settings.target_decay)',
            'RoleSpec("target", follows="student", decay=0.0)',
            "test_both_players_steps_are_the_papers[vp-epsilon-first-full]",
        ),
        (
            "hyper: the target is asked where the student is",
            "roles.target(step.x_u, u, batch.cond, end=end)",
            "roles.target(step.x_t, t, batch.cond, end=end)",
            "test_both_players_steps_are_the_papers[vp-epsilon-first-full]",
        ),
        (
            "hyper: a gradient flows through the target",
            ("        with torch.no_grad():\n            target = "),
            ("        with torch.enable_grad():\n            target = "),
            "test_no_graph_leads_from_one_players_loss_to_the_other_nor_through_the_target",
        ),
        (
            "hyper: the student jumps to where the hop lands",
            "x_s=pred.at(s), target=target)",
            "x_s=pred.at(u), target=target)",
            "test_both_players_steps_are_the_papers[vp-epsilon-first-full]",
        ),
        (
            "hyper: the end is not told",
            "s if self.settings.tell_end else None",
            "u if self.settings.tell_end else None",
            "test_both_players_steps_are_the_papers[vp-epsilon-told-full]",
        ),
        (
            "hyper: a drawn scale of guidance is its least",
            "self.guidance.scale(draws.guidance_scale)",
            "self.guidance.low",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided game-full]",
        ),
        (
            "hyper: the teacher hops in every stage",
            "scale, by=self.settings.hop_by)",
            "scale)",
            "test_both_players_steps_are_the_papers[vp-epsilon-later-full]",
        ),
        (
            "hyper: later stages hop by what the student has become",
            'RoleSpec("beginning", follows="student", decay=1.0)',
            'RoleSpec("beginning", follows="student", decay=0.0)',
            "test_a_stage_hops_by_what_its_student_was_when_it_began",
        ),
        (
            "hyper: later stages may be guided once more",
            'if self.hop_by == "beginning" and Guidance',
            'if self.hop_by == "" and Guidance',
            "test_wrong_settings_are_one_sentence",
        ),
        (
            "hyper: landings are judged where the hop lands",
            "self.gan.judge(roles, shared.x_s, s, draws.level",
            "self.gan.judge(roles, shared.x_s, u, draws.level",
            "test_both_players_steps_are_the_papers[vp-epsilon-later-full]",
        ),
        (
            "hyper: the discriminator takes the teacher's landing for the real one",
            "self.gan.discriminator(roles, shared.target, shared.s",
            "self.gan.discriminator(roles, shared.x_u, shared.s",
            "test_both_players_steps_are_the_papers[vp-epsilon-later-full]",
        ),
        (
            "hyper: the game counts alike in every stage",
            "total = loss + self.adversarial_weight * adversarial",
            "total = loss + adversarial",
            "test_both_players_steps_are_the_papers[vp-epsilon-later-full]",
        ),
        (
            "hyper: the mean square counts alike in every stage",
            "loss, parts = self.mse_weight * error",
            "loss, parts = error + 0 * self.mse_weight",
            "test_both_players_steps_are_the_papers[vp-epsilon-later-full]",
        ),
        (
            "hyper: stages of four segments have the weights of eight",
            "(4, (1.0, 0.005))",
            "(4, (1.0, 0.0))",
            "test_the_mean_square_leads_first_and_the_game_at_last",
        ),
        (
            "hyper: offset noise is one number to a place",
            "(shape[0], *[1] * (len(shape) - 1))",
            "shape",
            "test_noise_may_have_one_more_normal_to_each_channel",
        ),
        (
            "hyper: students of one segment are sampled on edges",
            'self.sampler = "tcd"',
            "pass",
            "test_segments_begin_where_the_student_is_sampled",
        ),
        (
            "hyper: hops may cross a boundary",
            "if n % k:",
            "if n < k:",
            "test_wrong_settings_are_one_sentence",
        ),
    ),
]
