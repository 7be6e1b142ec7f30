"""Planted defects of the method turbo."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/turbo.py",
        "methods/test_turbo.py",
        (
            "turbo: c(t) is sigma",
            'return alpha if self.settings.weighting == "exponential"',
            'return sigma if self.settings.weighting == "exponential"',
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "turbo: c(t) of sds forgets its half",
            "np.asarray(alpha * sigma / 2)",
            "np.asarray(alpha * sigma)",
            "test_in_latents_sds_has_the_gradient_of_score_distillation[vp]",
        ),
        (
            "turbo: the advice keeps its graph",
            ("        with torch.no_grad():\n            x_t = self.schedule"),
            ("        if True:\n            x_t = self.schedule"),
            "test_in_latents_sds_has_the_gradient_of_score_distillation[vp]",
        ),
        (
            "turbo: the student's own noise is the teacher's too",
            "x_t = self.schedule.add_noise(shared.x0_student, draws.teacher_noise, t)",
            "x_t = self.schedule.add_noise(shared.x0_student, draws.noise, t)",
            "test_both_players_steps_are_the_papers[vp-epsilon-advice alone]",
        ),
        (
            "turbo: the teacher is not guided",
            "return roles.teacher(x_t, t, cond, guidance_scale=scale).x0",
            "return roles.teacher(x_t, t, cond).x0",
            "test_both_players_steps_are_the_papers[vp-epsilon-advice alone]",
        ),
        (
            "turbo: the student advises itself",
            "return roles.teacher(x_t, t, cond, guidance_scale=scale).x0",
            "return roles.student(x_t, t, cond, guidance_scale=scale).x0",
            "test_both_players_steps_are_the_papers[vp-epsilon-advice alone]",
        ),
        (
            "turbo: pixels are compared with latents' weights: the answer is not decoded",
            'return roles.decode(latents) if self.settings.space == "pixels" else latents',
            "return latents",
            "test_both_players_steps_are_the_papers[vp-epsilon-advice alone]",
        ),
        (
            "turbo: nfsd goes against the prompt",
            "(scale * (given - without) + early * without)",
            "(scale * (without - given) + early * without)",
            "test_both_players_steps_are_the_papers[vp-epsilon-nfsd, table]",
        ),
        (
            "turbo: nfsd keeps eps_0 at high levels",
            "early = expand((t < self.levels",
            "early = expand((t >= self.levels",
            "test_both_players_steps_are_the_papers[vp-epsilon-nfsd, table]",
        ),
        (
            "turbo: the answer's pictures are detached before they are judged",
            'y = shared.seen if settings.space == "pixels" else roles.decode(x0_student)',
            "y = roles.decode(x0_student).detach()",
            "test_gradients_pass_through_decoder_and_encoder_and_stay_in_neither[vp]",
        ),
        (
            "turbo: both sides are augmented alike",
            "augmented(data, draws.real_augment, settings.augment)",
            "augmented(data, draws.fake_augment, settings.augment)",
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "turbo: heads are told the picture where the student saw noise alone",
            "return projection_condition(roles.helpers, cond, seen * summary)",
            "return projection_condition(roles.helpers, cond, summary)",
            "test_heads_are_told_the_picture_where_the_student_saw_it",
        ),
        (
            "turbo: the distillation has the game's weight",
            '"distillation": settings.distillation_weight}',
            '"distillation": settings.adversarial_weight}',
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "turbo: the discriminator is spared R1",
            'shared.real, shared.fake, "hinge", self.settings.r1_weight)',
            'shared.real, shared.fake, "hinge")',
            "test_both_players_steps_are_the_papers[vp-epsilon-the paper's]",
        ),
        (
            "turbo: the teacher is asked where nothing of the answer is left",
            "levels[schedule.alpha_sigma(levels)[0] > 0]",
            "levels",
            "test_the_teacher_is_asked_wherever_something_of_the_answer_is_left[flow-999]",
        ),
        (
            "turbo: the last level is never drawn",
            'rng.sample.integers("level", 0, len(self.timesteps))',
            'rng.sample.integers("level", 0, len(self.timesteps) - 1)',
            "test_draws_cover_all_levels_evenly_and_noises_are_their_own",
        ),
        (
            "turbo: EDM's alpha is taken as it is",
            'np.hypot(alpha, sigma) if self.schedule.family == "edm" else 1.0',
            "1.0",
            "test_both_players_steps_are_the_papers[edm-sample-advice alone]",
        ),
    ),
]
