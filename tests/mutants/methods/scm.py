"""Planted defects of the method scm."""

from tests.mutants.mutant import planted

STEP = "test_a_step_is_the_papers[vp-v_prediction-warming up-full]"
EXACT = "test_at_the_exact_consistency_function_the_squared_tangent_falls_as_the_step_squared"
TIMES = "test_times_are_log_normal_angles_and_one_step_below"
COARSE = "test_a_recipe_of_coarse_numbers_is_refused"
MATCHED = "test_a_step_is_the_papers[flow-flow-matched-full]"
FAKE = "test_the_fake_score_denoises_the_students_own_predictions[vp-epsilon-full]"
ARRIVES = "tests/methods/test_settings_arrive.py::test_a_setting_changes_a_step[scm.student_every]"
STREAMS = (
    "tests/methods/test_independent_streams.py::test_the_streams_of_a_step_are_independent"
    "[scm-matching_weight-any_steps-student_every]"
)
PRODUCTS = "test_training_lets_no_product_round_to_tf32"

MUTANTS = [
    *planted(
        "methods/scm.py",
        "methods/test_scm.py",
        ("scm: the student's F is the teacher's",
         "combine(-np.sin(a), np.cos(a))", "combine(np.cos(a), np.sin(a))", STEP),
        ("scm: the difference is along the student's own jump", "below = roles.student(teacher.at(draws.u),",
         "below = roles.student(roles.student(x_t, draws.t, batch.cond).at(draws.u),", EXACT),
        ("scm: the difference stays at x_t",
         "roles.student(teacher.at(draws.u), draws.u,", "roles.student(x_t, draws.u,",
         EXACT),
        ("scm: the teacher is not guided", "batch.cond, guidance_scale=scale)", "batch.cond)", STEP),
        ("scm: the warm-up slows the first part too", "expand(cos * np.sqrt(1 - (r * sin) ** 2), moved)",
         "expand(r * cos * np.sqrt(1 - (r * sin) ** 2), moved)", STEP),
        ("scm: the warm-up leaves the second part out",
         "expand(r * cos * sin, moved)", "expand(cos * sin, moved)", STEP),
        ("scm: the tangent has the wrong sign", "return -first -", "return first -", EXACT),
        ("scm: the state is not on the circle",
         "1 / np.hypot(*self.schedule.alpha_sigma(draws.t)), moved) * along.x_t",
         "np.ones(len(a)), moved) * along.x_t", "test_a_step_is_the_papers[edm-sample-unguided-full]"),
        ("scm: the norm is a sum over elements", "tangent.flatten(1).square().mean(1).sqrt()",
         "tangent.flatten(1).square().sum(1).sqrt()", STEP),
        ("scm: the tangent is never normalised", "        if c:", "        if False:", STEP),
        ("scm: rows of a large gain are all that a batch teaches",
         "loss = each.mean() if weight is None else", "loss = each.mean() if True else",
         "test_a_row_of_large_gain_moves_the_output_as_one_of_15"),
        ("scm: the bound is that of clean data", "pred.gain(-np.sin(a), np.cos(a))", "pred.gain()",
         "test_a_row_of_large_gain_moves_the_output_as_one_of_15"),
        ("scm: the tangent has a graph", "moved.detach() - tangent)", "moved - tangent)", STEP),
        ("scm: the times' spread is ignored",
         "settings.P_mean + settings.P_std * level", "settings.P_mean + level", TIMES),
        ("scm: the times' mean is ignored", "settings.P_mean + settings.P_std", "settings.P_std", TIMES),
        ("scm: the step leads to more noise",
         "u=self.time_at(a - settings.angle_step)", "u=self.time_at(a + settings.angle_step)", TIMES),
        ("scm: the warm-up never ends", "settings.warmup * progress.total", "progress.total",
         "test_the_warm_up_grows_over_its_share_of_the_steps"),
        ("scm: a row without a time in between divides by 0", "np.where(h > 0, np.sin(h), 1.0)", "np.sin(h)",
         "test_rows_without_a_time_in_between_are_finite"),
    ),
    *planted(
        "methods/scm.py",
        "methods/test_scm.py",
        ("rcm: the matching has no weight", "total = self.settings.matching_weight * matched.total",
         "total = matched.total", MATCHED),
        ("rcm: consistency is left out", "total=total, then=lambda: self.consistency(roles, batch, draws, along))",
         "total=total)", MATCHED),
        ("rcm: the matching is unguided", "MatchingSettings(guidance_scale=self.guidance.low)",
         "MatchingSettings(guidance_scale=1.0)", MATCHED),
        ("rcm: what is matched is the prediction at x_t", "roles.student(x, draws.times[draws.exit], batch.cond).x0",
         "roles.student(x, draws.times[0], batch.cond).x0", MATCHED),
        ("rcm: the matched prediction has no graph", 'with nullcontext() if "student" in due else torch.no_grad():',
         "with torch.no_grad():", MATCHED),
        ("rcm: the fake score reaches the student", "shared.x0_student.detach(), draws, batch.cond, None)",
         "batch.x0, draws, batch.cond, None)", FAKE),
        ("rcm: a step of the fake score alone asks the teacher",
         'along = self.along(roles, batch, draws) if "student" in due else None',
         "along = self.along(roles, batch, draws)", FAKE),
        ("rcm: a range of scales is let through",
         "if self.matching_weight and not Guidance.of(self.guidance_scale).fixed:", "if False:",
         "test_wrong_settings_are_one_sentence"),
        ("rcm: the fake score is there without matching",
         'return (student, RoleSpec("fake")) if self.settings.matching_weight else (student,)',
         'return (student, RoleSpec("fake"))', "test_matching_leaves_the_consistency_terms_numbers_alone"),
    ),
    *planted(
        "methods/scm.py",
        "methods/test_contract.py",
        ("rcm: the student learns at every step", "Player(\"student\", every=self.settings.student_every)",
         'Player("student")', ARRIVES),
        ("rcm: the student's own calls are not counted", '"student": 3 + exit,', '"student": 3,',
         f"tests/methods/test_scm.py::{FAKE}"),
        ("rcm: the rollout has the noise of the data", 'rng.sample.normal("rollout_noise", (',
         'rng.sample.normal("noise", (', STREAMS),
    ),
    *planted(
        "verification/scm.py",
        "methods/test_scm.py",
        ("verify: an exact student is a step off", "found[rows] = self.bench.flow(x[rows], float(time),",
         "found[rows] = self.bench.flow(x[rows], 0.9 * float(time),", EXACT),
    ),
    *planted(
        "verification/scm.py",
        "methods/test_scm.py",
        ("scm: calls are verified that random times do not reach", "min(matched.settings.any_steps, _CALLS) - 1",
         "matched.settings.any_steps + 10**6", "test_a_student_of_any_number_of_steps_is_verified[64]"),
    ),
    *planted(
        "recipe/schema.py",
        "methods/test_scm.py",
        ("recipe: the teacher's format is not looked at", '"teacher.dtype": self.teacher.dtype == "bf16"',
         '"teacher.dtype": False', COARSE),
        ("recipe: a quantised teacher is precise", '"teacher.quantize": self.teacher.quantize is not None',
         '"teacher.quantize": False', COARSE),
        ("recipe: every method needs precision", "if method.needs_precision and any", "if any", COARSE),
    ),
    *planted(
        "training/trainer.py",
        "methods/test_scm.py",
        ("trainer: convolutions round to TF32",
         "= (torch.backends.cuda.matmul, torch.backends.cudnn)", "= (torch.backends.cuda.matmul,)",
         PRODUCTS),
        ("trainer: no method may round to TF32",
         "with exact_products() if self.method.needs_precision else nullcontext():",
         "with exact_products():", PRODUCTS),
        ("trainer: TF32 stays off after a step", "            of.allow_tf32 = allowed", "            pass", PRODUCTS),
        ("trainer: TF32 stays off after an error", "    try:\n        yield\n    finally:\n        for of, allowed",
         "    yield\n    if True:\n        for of, allowed", "test_the_flags_are_given_back_after_an_error"),
        ("trainer: bf16 is let through",
         "if settings.autocast is not None:\n        raise", "if False:\n        raise", PRODUCTS),
        ("trainer: weights in bf16 are let through", "if dtype is not None and torch.finfo(dtype).bits < 32:",
         "if False:",
         "test_weights_in_bf16_are_refused"),
    ),
]  # fmt: skip
