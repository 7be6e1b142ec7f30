"""Planted defects of DMD2, of the two scores and of the student's own inputs."""

from tests.mutants.mutant import planted

_STEP = "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]"
_LINE = "tests/verification/test_dmd2_theory.py::test_every_row_of_the_line_holds"

DMD2 = [
    *planted(
        "methods/parts/score_pair.py",
        "methods/test_score_pair.py",
        (
            "score pair: the student climbs the divergence",
            "difference(fake, real), (x - real.x0)",
            "difference(real, fake), (x - real.x0)",
            "test_with_the_kl_weight_it_is_the_gradient_of_the_divergence",
        ),
        (
            "score pair: the kl weight is alpha over sigma, not squared",
            "expand(np.asarray((alpha / sigma) ** 2), gap) * gap",
            "expand(np.asarray(alpha / sigma), gap) * gap",
            "test_with_the_kl_weight_it_is_the_gradient_of_the_divergence",
        ),
        (
            "score pair: the fake score is guided, the real one is not",
            "real, plain = roles.teacher.with_and_without_guidance(x_t, t, cond, self.guidance_scale)",
            "real, plain = roles.teacher.with_and_without_guidance(x_t, t, cond, 1.0)",
            "tests/methods/test_dmd2.py::test_before_training_both_scores_agree_up_to_guidance",
        ),
        (
            "score pair: the two scores see different noises",
            "fake = roles.fake(x_t, t, cond)",
            "fake = roles.fake(x_t + 0.01 * noise, t, cond)",
            "test_it_vanishes_where_the_student_draws_as_the_teacher",
        ),
        (
            "score pair: the normaliser is the fake score's distance",
            "(x - real.x0).flatten(1).abs().mean(1)",
            "(x - fake.x0).flatten(1).abs().mean(1)",
            "test_l1_divides_each_answers_gap_by_its_own_mean_distance_to_the_real_score",
        ),
        (
            "score pair: one normaliser for the whole batch",
            "scale = away.clamp_min(",
            "scale = away.mean().expand_as(away).clamp_min(",
            "test_l1_divides_each_answers_gap_by_its_own_mean_distance_to_the_real_score",
        ),
        (
            "score pair: the logged teacher is the guided one",
            "fake_score_statistics(fake.x0, plain.x0, x)",
            "fake_score_statistics(fake.x0, real.x0, x)",
            "test_the_teachers_error_in_the_log_is_that_without_guidance",
        ),
        (
            "score pair: predictions are converted before they are compared",
            "if a.prediction_type != b.prediction_type:",
            "if True:",
            "test_the_gap_keeps_its_digits_at_high_noise",
        ),
        (
            "score pair: the loss rounds the gradient to digits of the answers",
            "0.5 * (x - x.detach() + gradient).square().mean()",
            "0.5 * (x - (x - gradient).detach()).square().mean()",
            "test_the_loss_has_the_gradient_even_next_to_large_answers",
        ),
        (
            "score pair: the loss has twice the gradient",
            "return 0.5 * (x - x.detach()",
            "return (x - x.detach()",
            "test_the_loss_has_the_gradient_even_next_to_large_answers",
        ),
        (
            "score pair: levels beyond the table are drawn",
            "min(int(high * count), count - 1) + 1",
            "min(int(high * count), count)",
            "test_levels_and_where_they_are_drawn",
        ),
        (
            "score pair: the fake score's loss moves the answers",
            "x = working(x.detach())",
            "x = working(x)",
            "test_the_fake_scores_loss_is_the_error_of_what_its_network_predicts",
        ),
        (
            "score pair: an x0 network learns at high noise alone",
            "return np.asarray((alpha / sigma) ** 2 + 1 / sigma_data**2)",
            "return np.asarray(1 / sigma_data**2 + 0 * alpha)",
            "test_the_fake_scores_loss_is_the_error_of_what_its_network_predicts",
        ),
        (
            "score pair: flow levels are not shifted",
            "return schedule.shifted(np.arange(1, steps + 1) / steps)",
            "return np.arange(1, steps + 1) / steps",
            "test_levels_and_where_they_are_drawn",
        ),
    ),
    *planted(
        "methods/dmd2.py",
        "methods/test_dmd2.py",
        (
            "distribution matching: the critic's answers keep the student's graph",
            "answers = shared.answer.detach()",
            "answers = shared.answer",
            "test_no_graph_leads_from_the_critics_losses_to_the_student",
        ),
        (
            "distribution matching: real and fake change places",
            "told_apart = verdict(real, fake,",
            "told_apart = verdict(fake, real,",
            _STEP,
        ),
        (
            "distribution matching: the student is pleased to be found out",
            "return Loss(loss + game, parts",
            "return Loss(loss - game, parts",
            _STEP,
        ),
        (
            "distribution matching: the game's gradient is not weighted",
            "(pull,) = torch.autograd.grad(self.settings.adversarial_weight * adversarial, leaf)",
            "(pull,) = torch.autograd.grad(adversarial, leaf)",
            _STEP,
        ),
        (
            "distribution matching: data and answers are judged under one noise",
            "self._judged(roles, batch, answers, draws.judged_time, draws.judged_noise)",
            "self._judged(roles, batch, answers, draws.data_time, draws.data_noise)",
            _STEP,
        ),
        (
            "distribution matching: the discriminator's loss counts as much as the fake score's",
            "weighted = self.settings.discriminator_weight * told_apart.total",
            "weighted = told_apart.total",
            _STEP,
        ),
        (
            "distribution matching: the critic forgets the discriminator",
            "then=judge if self.game else None",
            "then=None",
            _STEP,
        ),
        (
            "distribution matching: scores are compared at the fake score's times",
            "draws.matching_noise, draws.matching_time, batch.cond",
            "draws.matching_noise, draws.fake_time, batch.cond",
            _STEP,
        ),
        (
            "distribution matching: there is a graph where the student is not due",
            'with nullcontext() if "student" in due else torch.no_grad():',
            "with nullcontext():",
            "test_one_graph_of_a_network_at_a_time",
        ),
        (
            "distribution matching: the student moves at every step",
            'Player("student", every=settings.student_every)',
            'Player("student")',
            "test_without_its_weight_there_is_no_discriminator",
        ),
        (
            "distribution matching: the heads have no player",
            'owned = ("fake", self.game.name)',
            'owned = ("fake",)',
            "test_without_its_weight_there_is_no_discriminator",
        ),
        (
            "distribution matching: scores are matched at every level",
            'self.scores.draw_time(rng, "matching_time", 0.02, 0.98)',
            'self.scores.draw_time(rng, "matching_time")',
            "test_draws",
        ),
        (
            "distribution matching: students are sampled in four steps whatever their times",
            "Sampling(len(times) or settings.num_inference_steps,",
            "Sampling(settings.num_inference_steps,",
            "test_one_step_at_a_lower_time_starts_from_noise_as_it_is",
        ),
    ),
    *planted(
        "methods/parts/inputs.py",
        "methods/test_dmd2.py",
        (
            "inputs: simulated answers are noised to the time they came from",
            "noise[:, i + 1], self.timesteps[i + 1])",
            "noise[:, i + 1], self.timesteps[i])",
            "test_a_student_is_trained_where_it_will_be_sampled",
        ),
        (
            "inputs: one noise serves the whole way",
            "noise[:, i + 1], self.timesteps[i + 1])",
            "noise[:, 0], self.timesteps[i + 1])",
            "test_a_student_is_trained_where_it_will_be_sampled",
        ),
        (
            "inputs: the gradient runs through every call",
            "        with torch.no_grad():\n            for i in range(exit):",
            "        if True:\n            for i in range(exit):",
            "test_a_student_is_trained_where_it_will_be_sampled",
        ),
        (
            "inputs: the first state holds data",
            'if self.policy == "noised" and (exit > 0 or self.terminal == "table"):',
            'if self.policy == "noised":',
            "test_the_first_state_is_noise_even_where_the_others_are_data",
        ),
        (
            "inputs: the student is never trained at its first time",
            'rng.shared.integer("exit", 0, len(self.timesteps))',
            'rng.shared.integer("exit", 1, len(self.timesteps))',
            "test_draws",
        ),
        (
            "inputs: simulated inputs are data after all",
            'if self.policy == "noised" and (exit > 0',
            "if (exit > 0",
            _LINE,
        ),
    ),
    *planted(
        "training/players.py",
        "training/test_step.py",
        (
            "players: terms after the first one are not learnt from",
            "for term in loss.terms():",
            "for term in [loss]:",
            "test_terms_that_go_backward_one_after_the_other_are_one_loss",
        ),
        (
            "players: the log has the last term alone",
            "done.total += term.total.detach()",
            "done.total = term.total.detach()",
            "test_terms_that_go_backward_one_after_the_other_are_one_loss",
        ),
    ),
    *planted(
        "methods/parts/discriminators.py",
        "methods/test_discriminators.py",
        (
            "discriminators: the last tap is the first one",
            "list(channels)[-1:]",
            "list(channels)[:1]",
            "test_heads_are_built_for_the_network_of_their_own_backbone_and_for_its_last_tap_alone",
        ),
    ),
    *planted(
        "students/student.py",
        "export/test_student.py",
        (
            "cards: a student's own times are forgotten when its number of steps is asked for",
            'given.get("num_inference_steps") in (None, len(card.timesteps))',
            'given.get("num_inference_steps") is None',
            "test_a_card_with_timesteps_leads_there_unless_the_user_says_otherwise",
        ),
    ),
]
