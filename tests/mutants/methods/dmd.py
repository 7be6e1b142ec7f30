"""Planted defects of the method dmd."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/dmd.py",
        "methods/test_dmd.py",
        (
            "dmd: the answers to the pairs' noise are matched, those to fresh noise regressed",
            "return Shared(x[: len(draws.start)], x[len(draws.start) :])",
            "return Shared(x[len(draws.start) :], x[: len(draws.start)])",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the student starts the pairs from fresh noise",
            "torch.cat([draws.start, pairs.noise])",
            "torch.cat([draws.start, draws.start])",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: pairs are given the captions of the data",
            "cond = Cond.cat([cond, pairs.cond])",
            "cond = Cond.cat([cond, cond])",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the student is asked one step below pure noise",
            "float(schedule.start if given is None else given)",
            "float(schedule.start - 1 if given is None else given)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: guidance weighs the unconditional score with 2 - w, not 1 - w",
            "ScorePair(schedule, self.settings.guidance_scale, self",
            "ScorePair(schedule, self.settings.guidance_scale - 1, self",
            "tests/verification/test_closed_forms.py::test_guided_dmd_ends_where_the_closed_form_says",
        ),
        (
            "dmd: another time of the student is not heard",
            "float(schedule.start if given is None else given)",
            "float(schedule.start)",
            "test_both_players_steps_are_the_papers[vp-epsilon-asked earlier-full]",
        ),
        (
            "dmd: regression is towards the data",
            'wanted = batch.needed_pairs("DMD").x0',
            "wanted = batch.x0",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: regression of the fresh answers",
            "self._regression(roles, shared.reference, wanted)",
            "self._regression(roles, x, wanted)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: features of the latents, not of the pictures",
            "roles.encoder.features(roles.decode(reference), taps)",
            "roles.encoder.features(reference, taps)",
            "test_both_players_steps_are_the_papers[vp-epsilon-features-full]",
        ),
        (
            "dmd: the regression's weight is left out",
            "matching + settings.regression_weight * regression",
            "matching + regression",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the regression carries no gradient",
            "matching + settings.regression_weight * regression",
            "matching + settings.regression_weight * regression.detach()",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the student goes against the scores",
            "matching = matching_loss(x, found.gradient)",
            "matching = matching_loss(x, -found.gradient)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: both scores are compared at the fake score's time",
            "self.scores.matching(roles, x, draws.noise, draws.time, batch.cond)",
            "self.scores.matching(roles, x, draws.noise, draws.fake_time, batch.cond)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the fake score learns from the noise it is compared at",
            "draws.fake_noise, draws.fake_time, batch.cond))",
            "draws.noise, draws.fake_time, batch.cond))",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the fake score learns from the pairs' answers",
            "denoising_loss(roles, shared.x0_student,",
            "denoising_loss(roles, shared.reference,",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the teacher is not guided",
            "ScorePair(schedule, self.settings.guidance_scale, self.settings.weighting)",
            "ScorePair(schedule, 1.0, self.settings.weighting)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "dmd: the scores are compared at all levels",
            'self.scores.draw_time(rng, "time", *MATCHED)',
            'self.scores.draw_time(rng, "time")',
            "test_draws_are_uniform_over_the_levels_that_the_paper_names",
        ),
        (
            "dmd: the fake score never sees the ends of the schedule",
            'self.scores.draw_time(rng, "fake_time")',
            'self.scores.draw_time(rng, "fake_time", 0.02, 0.98)',
            "test_draws_are_uniform_over_the_levels_that_the_paper_names",
        ),
        (
            "dmd: one time for both players",
            'self.scores.draw_time(rng, "fake_time")',
            'self.scores.draw_time(rng, "time")',
            "test_draws_are_uniform_over_the_levels_that_the_paper_names",
        ),
        (
            "dmd: its students are sampled at pure noise whatever they were asked at",
            "times = () if settings.timestep is None else (settings.timestep,)",
            "times: tuple[float, ...] = ()",
            "test_its_students_are_asked_once_where_they_were_trained",
        ),
        (
            "dmd: the card forgets that one step starts at 800",
            "times = () if settings.timestep is None else (settings.timestep,)",
            "times: tuple[float, ...] = ()",
            "tests/runs/test_distill_hyper.py::test_times_of_the_method_go_with_as_many_steps_alone",
        ),
        (
            "dmd: fake scores begin as the teacher whatever is asked",
            "init_from=self.settings.fake_init_from",
            'init_from="teacher"',
            "tests/methods/test_hyper.py::test_a_fake_score_may_begin_as_the_student",
        ),
    ),
]
