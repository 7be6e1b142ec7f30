"""Planted defects of the method ladd."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/ladd.py",
        "methods/test_ladd.py",
        (
            "ladd: the answer is detached before it is judged",
            "fake = self.schedule.add_noise(x0_student, draws.fake_noise, t)",
            "fake = self.schedule.add_noise(x0_student.detach(), draws.fake_noise, t)",
            "test_the_answer_feels_every_logit_and_the_teacher_none[vp]",
        ),
        (
            "ladd: the real side is noise",
            "self.schedule.add_noise(batch.x0, draws.real_noise, t)",
            "self.schedule.add_noise(draws.noise, draws.real_noise, t)",
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "ladd: both sides have one noise",
            "self.schedule.add_noise(batch.x0, draws.real_noise, t)",
            "self.schedule.add_noise(batch.x0, draws.fake_noise, t)",
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "ladd: the student's time is the judge's",
            "features = roles.teacher.features(fake, t, batch.cond, taps)",
            "features = roles.teacher.features(fake, s, batch.cond, taps)",
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "ladd: the student judges itself",
            "features = roles.teacher.features(fake, t, batch.cond, taps)",
            "features = roles.student.features(fake, t, batch.cond, taps)",
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "ladd: the answer is the network's output",
            "x0_student = roles.student(x_s, s, batch.cond).x0",
            "x0_student = roles.student(x_s, s, batch.cond).output",
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "ladd: the judged level is that of alpha/sigma",
            "self.schedule.time_at(np.exp(ratio.numpy()))",
            "self.schedule.time_at(np.exp(-ratio.numpy()))",
            "test_judged_levels_are_logit_normal_on_every_schedule[flow]",
        ),
        (
            "ladd: levels between two of the table are cut, not rounded",
            'return times.round() if self.schedule.family == "vp" else times',
            'return times.floor() if self.schedule.family == "vp" else times',
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "ladd: heads are not told the level",
            "return projection_condition(roles.helpers, cond, sinusoid(ratio, LEVEL_WIDTH))",
            "return projection_condition(roles.helpers, cond, sinusoid(0 * ratio, LEVEL_WIDTH))",
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "ladd: the warm-up never ends",
            "if progress.step < settings.warmup_steps else",
            "if progress.step <= settings.warmup_steps else",
            "test_levels_are_drawn_by_their_weights_after_a_warm_up_of_the_easy_ones",
        ),
        (
            "ladd: the game is always the hinge's",
            "generator_loss(conditioned_heads(roles, shared.condition)(shared.fake), self.settings.loss)",
            "generator_loss(conditioned_heads(roles, shared.condition)(shared.fake))",
            "test_both_players_steps_are_the_papers[vp-epsilon-logistic]",
        ),
        (
            "ladd: levels are read from the wrong end",
            'side="right")',
            'side="right") * -1 + settings.num_levels - 1',
            "test_levels_are_drawn_by_their_weights_after_a_warm_up_of_the_easy_ones",
        ),
    ),
]
