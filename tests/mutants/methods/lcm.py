"""Planted defects of the method lcm."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/lcm.py",
        "methods/test_lcm.py",
        (
            "lcm: the target keeps its graph",
            ("        with torch.no_grad():\n            target = consistency("),
            ("        if True:\n            target = consistency("),
            "test_no_gradient_flows_through_the_target",
        ),
        (
            "lcm: a step goes up, from the lower time",
            "t, u = self.grid[draws.index + 1], self.grid[draws.index]",
            "u, t = self.grid[draws.index + 1], self.grid[draws.index]",
            "test_a_step_is_the_papers",
        ),
        (
            "lcm: the student is asked at the target's time",
            "roles.student(shared.x_t, shared.t, batch.cond",
            "roles.student(shared.x_t, shared.u, batch.cond",
            "test_a_step_is_the_papers",
        ),
        (
            "lcm: the target is the student, not its average",
            "consistency(roles.target(step.x_u, u",
            "consistency(roles.student(step.x_u, u",
            "test_the_ema_target_is_the_lagging_weights_not_the_student",
        ),
        (
            "lcm: the target answers at the upper time",
            "consistency(roles.target(step.x_u, u, batch.cond",
            "consistency(roles.target(step.x_u, t, batch.cond",
            "test_the_lowest_hop_is_anchored_to_the_teacher_to_the_bit",
        ),
        (
            "lcm: the scale the student is told counts from 0",
            "embed = draws.guidance_scale if self.settings.guidance_embed else None",
            "embed = draws.guidance_scale - 1 if self.settings.guidance_embed else None",
            "test_a_step_is_the_papers[vp-epsilon-told scale-full-True]",
        ),
        (
            "lcm: the top hop is never drawn",
            'rng.sample.integers("index", 0, self.settings.num_grid_steps)',
            'rng.sample.integers("index", 0, self.settings.num_grid_steps - 1)',
            "test_draws_cover_every_hop_and_the_whole_range_of_scales",
        ),
    ),
]
