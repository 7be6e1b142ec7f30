"""Planted defects of Hyper-SD's segments, of its later stages, and of the one step that follows them."""

from tests.mutants.mutant import planted

STEP = "test_both_players_steps_are_the_papers[vp-epsilon-{}-full]"
VERIFIED = "tests/verification/test_verify.py::test_hypers_segments_and_fixed_points_hold_on_every_schedule[vp]"
METHOD = planted(
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
        "        n = index + 1\n        return",
        "        n = index\n        return",
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
        VERIFIED,
    ),
    (
        "hyper: the target lags behind nothing",
        'RoleSpec("target", follows="student", decay=self.settings.target_decay)',
        'RoleSpec("target", follows="student", decay=0.0)',
        STEP.format("first"),
    ),
    (
        "hyper: the target is asked where the student is",
        "roles.target(hop.x_u, u, batch.cond, end=told)",
        "roles.target(hop.x_t, t, batch.cond, end=told)",
        STEP.format("first"),
    ),
    (
        "hyper: a gradient flows through the target",
        "        with torch.no_grad():\n            target = ",
        "        with torch.enable_grad():\n            target = ",
        "test_no_graph_leads_from_one_players_loss_to_the_other_nor_through_the_target",
    ),
    (
        "hyper: the student jumps to where the hop lands",
        "landing=said.at(s), target=target)",
        "landing=said.at(u), target=target)",
        STEP.format("first"),
    ),
    (
        "hyper: the end is not told",
        "s if self.settings.tell_end else None",
        "u if self.settings.tell_end else None",
        STEP.format("told"),
    ),
    (
        "hyper: a drawn scale of guidance is its least",
        "self.guidance.scale(draws.guidance_scale)",
        "self.guidance.low",
        STEP.format("guided game"),
    ),
    (
        "hyper: the teacher hops in every stage",
        "scale, by=self.settings.hop_by)",
        "scale)",
        STEP.format("later"),
    ),
    (
        "hyper: later stages hop by what the student has become",
        'RoleSpec("beginning", follows="student", decay=1.0)',
        'RoleSpec("beginning", follows="student", decay=0.0)',
        "test_a_stage_hops_by_what_its_student_was_when_it_began",
    ),
    (
        "hyper: later stages may be guided once more",
        'if settings.hop_by == "beginning" and guidance',
        'if settings.hop_by == "" and guidance',
        "test_wrong_settings_are_one_sentence",
    ),
    (
        "hyper: landings are judged where the hop lands",
        "self.game.show(roles, shared.landing, s, draws.level",
        "self.game.show(roles, shared.landing, u, draws.level",
        STEP.format("later"),
    ),
    (
        "hyper: the discriminator takes the teacher's landing for the real one",
        "self.game.discriminator(roles, shared.target, shared.s",
        "self.game.discriminator(roles, shared.x_u, shared.s",
        STEP.format("later"),
    ),
    (
        "hyper: the game counts alike in every stage",
        "total = loss + self.adversarial_weight * adversarial",
        "total = loss + adversarial",
        STEP.format("later"),
    ),
    (
        "hyper: the mean square counts alike in every stage",
        "loss, parts = self.mse_weight * error",
        "loss, parts = error + 0 * self.mse_weight",
        STEP.format("later"),
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
        "if k < 1 or hops < k or hops % k:",
        "if k < 1 or hops < k:",
        "test_wrong_settings_are_one_sentence",
    ),
)
AROUND = [
    *planted(
        "verification/fixed_points.py",
        "verification/test_verify.py",
        (
            "fixed points: a segment's targets reach into the next one",
            "floor = (m - 1) // self.stride * self.stride",
            "floor = 0",
            VERIFIED,
        ),
    ),
    *planted(
        "training/trainer.py",
        "methods/test_hyper.py",
        (
            "init: a fake score that is to begin as the student begins as the teacher",
            'if spec.name == "student" or spec.begins_as == "student":',
            'if spec.name == "student":',
            "test_a_fake_score_may_begin_as_the_student",
        ),
        (
            "init: every role begins as the student",
            'if spec.name == "student" or spec.begins_as == "student":',
            "if spec.follows is None and not spec.features_only:",
            "test_a_fake_score_may_begin_as_the_student",
        ),
    ),
    *planted(
        "methods/dmd.py",
        "runs/test_distill_hyper.py",
        (
            "dmd: the card forgets that one step starts at 800",
            "times = () if settings.timestep is None else (settings.timestep,)",
            "times: tuple[float, ...] = ()",
            "test_times_of_the_method_go_with_as_many_steps_alone",
        ),
        (
            "dmd: fake scores begin as the teacher whatever is asked",
            "begins_as=self.settings.fake_begins",
            'begins_as="teacher"',
            "tests/methods/test_hyper.py::test_a_fake_score_may_begin_as_the_student",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_distill_hyper.py",
        (
            "job: the recipe's sampler is not the card's",
            "sampler=recipe.sample.sampler or self.method.sampler",
            "sampler=self.method.sampler",
            "test_times_of_the_method_go_with_as_many_steps_alone",
        ),
        (
            "job: one time of the method's for two steps of another sampler",
            "recipe.sample.sampler is None or len(wanted.timesteps) == few",
            "True",
            "test_times_of_the_method_go_with_as_many_steps_alone",
        ),
    ),
    *planted(
        "runs/teacher_samples.py",
        "runs/test_distill_hyper.py",
        (
            "prepare: every stage samples the teacher for itself",
            "if shared is not None and job.recipe.pairs.path is None:",
            "if shared is None and job.recipe.pairs.path is None:",
            "test_stages_share_the_samples_of_the_teacher_that_both_want",
        ),
        (
            "prepare: stages share what they do not both want",
            "json.dumps(wanted, sort_keys=True)",
            "json.dumps(sorted(wanted), sort_keys=True)",
            "test_stages_share_the_samples_of_the_teacher_that_both_want",
        ),
    ),
    *planted(
        "export/scheduler.py",
        "export/test_scheduler.py",
        (
            "export: students that re-noise have no scheduler",
            '(sampler.name == "renoise" and times[-2] >= 100)',
            '(sampler.name == "renoise" and times[-2] < 0)',
            "test_what_is_saved_steps_like_us[dmd2-epsilon]",
        ),
        (
            "export: what re-noises on a flow model jumps on",
            "if sampler.name in _ANEW else",
            'if sampler.name == "lcm" else',
            "test_flow_samplers_step_like_us",
        ),
    ),
    *planted(
        "recipe/schema.py",
        "runs/test_distill_hyper.py",
        (
            "recipe: another sampler must take the method's steps",
            "bound = wanted.no_other_steps and recipe.sample.sampler is None",
            "bound = wanted.no_other_steps",
            "test_a_sampler_of_the_recipes_own",
        ),
        (
            "recipe: any word is a sampler",
            "if value is not None and value not in SAMPLERS:",
            "if value is not None and not value:",
            "test_a_sampler_of_the_recipes_own",
        ),
    ),
]
HYPER = [*METHOD, *AROUND]
