"""Planted defects of the method dmd2."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/dmd2.py",
        "methods/test_dmd2.py",
        (
            "distribution matching: the critic's answers keep the student's graph",
            "x0 = shared.x0_student.detach()",
            "x0 = shared.x0_student",
            "test_no_graph_leads_from_the_critics_losses_to_the_student",
        ),
        (
            "distribution matching: the critic forgets the discriminator",
            "then=discriminator_term if self.gan else None",
            "then=None",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "distribution matching: there is a graph where the student is not due",
            'with nullcontext() if "student" in due else torch.no_grad():',
            "with nullcontext():",
            "test_one_graph_of_a_network_at_a_time",
        ),
        (
            "distribution matching: the student moves at every step",
            'Player("student", every=settings.student_every, start',
            'Player("student", start',
            "test_without_its_weight_there_is_no_discriminator",
        ),
        (
            "distribution matching: numbers are drawn for a student that is not due",
            'due = progress.plays("student")',
            "due = True",
            "test_no_noise_is_drawn_for_a_student_that_is_not_due",
        ),
        (
            "distribution matching: the heads have no player",
            'owned = ("fake", self.gan.name)',
            'owned = ("fake",)',
            "test_without_its_weight_there_is_no_discriminator",
        ),
        (
            "distribution matching: students are sampled in four steps whatever their times",
            "Sampling(len(times) or settings.num_inference_steps,",
            "Sampling(settings.num_inference_steps,",
            "test_one_step_at_a_lower_time_starts_from_noise_as_it_is",
        ),
    ),
    *planted(
        "methods/parts/score_gan.py",
        "methods/test_dmd2.py",
        (
            "distribution matching: real and fake change places",
            "gan_loss = logged_discriminator_loss(real, fake,",
            "gan_loss = logged_discriminator_loss(fake, real,",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "distribution matching: the student is pleased to be found out",
            "return Loss(loss + gan, parts",
            "return Loss(loss - gan, parts",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "distribution matching: the game's gradient is not weighted",
            "(grad,) = torch.autograd.grad(self.weight * adversarial, leaf)",
            "(grad,) = torch.autograd.grad(adversarial, leaf)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "distribution matching: data and answers are judged under one noise",
            "self._logits(roles, x0, draws.judged_time, draws.judged_noise, cond)",
            "self._logits(roles, x0, draws.data_time, draws.data_noise, cond)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "distribution matching: the discriminator's loss counts as much as the fake score's",
            "weighted = self.discriminator_weight * gan_loss.total",
            "weighted = gan_loss.total",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
    ),
    *planted(
        "methods/parts/matching.py",
        "methods/test_dmd2.py",
        (
            "distribution matching: scores are compared at the fake score's times",
            "draws.matching_noise, draws.matching_time, batch.cond",
            "draws.matching_noise, draws.fake_time, batch.cond",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "distribution matching: scores are matched at every level",
            'self.scores.draw_time(rng, "matching_time", *MATCHED, above, upto)',
            'self.scores.draw_time(rng, "matching_time", 0.0, 1.0, above, upto)',
            "test_draws",
        ),
    ),
]
