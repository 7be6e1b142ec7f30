"""Planted defects of the method pcm."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/pcm.py",
        "methods/test_pcm.py",
        (
            "pcm: the target keeps its graph",
            ("        with torch.no_grad():\n            target = roles.target("),
            ("        if True:\n            target = roles.target("),
            "test_no_gradient_flows_through_the_target",
        ),
        (
            "pcm: the target is asked at t, not where the teacher landed",
            "target = roles.target(step.x_u, u, batch.cond)",
            "target = roles.target(step.x_u, t, batch.cond)",
            "test_landing_on_an_edge_the_target_is_the_teachers_point_to_the_bit",
        ),
        (
            "pcm: the target's edge is that of its own time, a phase too low on an edge",
            "roles.target(step.x_u, u, batch.cond).at(edge)",
            "roles.target(step.x_u, u, batch.cond).at(self.edges[self.phase[(draws.index - 1).clamp_min(0)]])",
            "test_landing_on_an_edge_the_target_is_the_teachers_point_to_the_bit",
        ),
        (
            "pcm: a time on an edge belongs to the phase above it",
            'np.searchsorted(edges, grid[:-1], side="right") - 1',
            'np.minimum(np.searchsorted(edges, grid[1:], side="right") - 1, len(edges) - 2)',
            "test_edges_and_the_phase_of_every_hop",
        ),
        (
            "pcm: the student jumps to where the teacher landed",
            "x_edge = pred.at(edge)",
            "x_edge = pred.at(u)",
            "test_both_players_steps_are_the_papers",
        ),
        (
            "pcm: the target is the student, not what trails it",
            "target = roles.target(step.x_u",
            "target = roles.student(step.x_u",
            "test_both_players_steps_are_the_papers[vp-epsilon-drawn scale, lagging-full]",
        ),
        (
            "pcm: the teacher answers in the student's place",
            "pred = roles.student(step.x_t",
            "pred = roles.teacher(step.x_t",
            "test_both_players_steps_are_the_papers",
        ),
        (
            "pcm: a and b are noised alike",
            "renoise(self.schedule, target, edge, noised, draws.real_noise)",
            "renoise(self.schedule, target, edge, noised, draws.fake_noise)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "pcm: the answers are noised as if they were clean",
            "renoise(self.schedule, x_edge, edge, noised, draws.fake_noise)",
            "self.schedule.add_noise(x_edge, draws.fake_noise, noised)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "pcm: the teacher sees the noised answer at the edge's time",
            "shared.fake = self.gan.features(roles, fake, noised, batch.cond)",
            "shared.fake = self.gan.features(roles, fake, edge, batch.cond)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "pcm: no gradient reaches the student through the discriminator",
            "fake = renoise(self.schedule, x_edge, edge",
            "fake = renoise(self.schedule, x_edge.detach(), edge",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "pcm: the real side keeps the captions that were dropped",
            "shared.real = self.gan.features(roles, real, noised, batch.cond)",
            ("shared.real = self.gan.features(roles, real, noised, None if batch.cond is None else batch.cond[:1])"),
            "test_both_players_steps_are_the_papers[vp-epsilon-normal-cfg-full]",
        ),
        (
            "pcm: real and fake change places",
            "self.gan.player_loss(roles, shared.real, shared.fake)",
            "self.gan.player_loss(roles, shared.fake, shared.real)",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "pcm: the student is pleased to be found out",
            "total = loss + self.settings.adversarial_weight * adversarial",
            "total = loss - self.settings.adversarial_weight * adversarial",
            "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]",
        ),
        (
            "pcm: noised times reach past the phase",
            "low, high = self.edges[phase], self.edges[phase + 1]",
            "low, high = self.edges[phase], self.edges[phase + 1] + 1",
            "test_draws_cover_every_hop_and_every_height",
        ),
        (
            "pcm: flow and EDM times are even in the phase, not over its hops",
            'if self.schedule.family == "vp":',
            "if True:",
            "test_noised_times_elsewhere_are_even_over_the_hops",
        ),
        (
            "pcm: captions are kept as often as they should be dropped",
            'rng.sample.uniform("caption") < dropout if dropout else None',
            'rng.sample.uniform("caption") >= dropout if dropout else None',
            "test_captions_are_dropped_as_often_as_asked",
        ),
        (
            "pcm: students are sampled in four steps whatever their phases",
            "return Sampling(settings.num_phases, guidance",
            "return Sampling(4, guidance",
            "test_students_want_as_many_steps_as_phases_and_guidance_only_if_they_were_trained_without",
        ),
        (
            "pcm: its edges are handed to a sampler that steps elsewhere",
            'sampler = "phased"',
            'sampler = "tcd"',
            "tests/verification/test_fixed_points.py::test_the_card_of_a_pcm_student_leads_to_its_training_edges",
        ),
    ),
]
