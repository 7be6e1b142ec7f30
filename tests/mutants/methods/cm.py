"""Planted defects of the method cm."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/cm.py",
        "methods/test_cm.py",
        (
            "cm: the target keeps its graph",
            "with torch.no_grad(), self._same_dropout(draws):",
            "with self._same_dropout(draws):",
            "test_no_gradient_flows_through_the_target",
        ),
        (
            "cm: the student has no graph",
            "consistency(roles.student(shared.x_t, shared.t, batch.cond))",
            "consistency(roles.student(shared.x_t, shared.t, batch.cond)).detach().requires_grad_()",
            "tests/methods/test_contract.py::test_each_loss_reaches_its_players_parameters_and_nobody_elses",
        ),
        (
            "cm: the target is the student, not its average",
            "consistency(roles.target(step.x_u, step.u",
            "consistency(roles.student(step.x_u, step.u",
            "test_the_ema_target_is_the_lagging_weights_not_the_student",
        ),
        (
            "cm: the target is the teacher",
            "consistency(roles.target(step.x_u, step.u",
            "consistency(roles.teacher(step.x_u, step.u",
            "test_a_step_is_the_papers[vp-epsilon-ct-full-True]",
        ),
        (
            "cm: the target answers at the upper time",
            "consistency(roles.target(step.x_u, step.u",
            "consistency(roles.target(step.x_u, step.t",
            "test_the_lowest_hop_is_anchored_to_the_bit",
        ),
        (
            "cm: the target starts from the student's state",
            "consistency(roles.target(step.x_u, step.u",
            "consistency(roles.target(step.x_t, step.u",
            "test_the_lowest_hop_is_anchored_to_the_bit",
        ),
        (
            "cm: the student is asked at the target's time",
            "consistency(roles.student(shared.x_t, shared.t",
            "consistency(roles.student(shared.x_t, shared.u",
            "test_a_step_is_the_papers",
        ),
        (
            "cm: the answer is the student's clean data, without its boundary",
            "x0_student = consistency(roles.student(shared.x_t, shared.t, batch.cond))",
            "x0_student = roles.student(shared.x_t, shared.t, batch.cond).x0",
            "test_a_step_is_the_papers[edm-sample-ct-full-True]",
        ),
        (
            "cm: hops go up",
            ("t=grid[index + 1],\n            u=grid[index],"),
            ("t=grid[index],\n            u=grid[index + 1],"),
            "test_hops_are_neighbours_of_the_papers_grid_all_equally_likely",
        ),
        (
            "cm: a hop skips a grid point",
            "t=grid[index + 1],",
            "t=grid[(index + 2).clamp(max=len(grid) - 1)],",
            "test_hops_are_neighbours_of_the_papers_grid_all_equally_likely",
        ),
        (
            "cm: the weight grows with the hop",
            "return np.asarray(1 / (level(t) - level(u)))",
            "return np.asarray(level(t) - level(u))",
            "test_a_step_is_the_papers[vp-epsilon-ict-full-True]",
        ),
        (
            "cm: the weight of a VP hop counts table steps",
            "level = self.schedule.solver_level",
            "level = lambda time: time.numpy()",
            "test_a_step_is_the_papers[vp-epsilon-ict-full-True]",
        ),
        (
            "cm: lognormal hops have the variance for a standard deviation",
            "(math.sqrt(2) * self.settings.P_std)",
            "(math.sqrt(2) * self.settings.P_std**2)",
            "test_lognormal_hops_have_the_mass_of_their_log_levels",
        ),
        (
            "cm: the error function lacks its root of two",
            "(math.sqrt(2) * self.settings.P_std)",
            "self.settings.P_std",
            "test_lognormal_hops_have_the_mass_of_their_log_levels",
        ),
        (
            "cm: the mean of log levels has the wrong sign",
            "(log_level - self.settings.P_mean)",
            "(log_level + self.settings.P_mean)",
            "test_lognormal_hops_have_the_mass_of_their_log_levels",
        ),
        (
            "cm: the grid doubles one stretch too late",
            "(math.log2(last // first) + 1)",
            "max(1, math.log2(last // first))",
            "test_the_grid_doubles_in_equal_stretches_of_training",
        ),
        (
            "cm: the grid grows past its last size",
            "return int(min(first * 2 ** (progress.step // stretch), last))",
            "return int(first * 2 ** (progress.step // stretch))",
            "test_the_grid_doubles_in_equal_stretches_of_training",
        ),
        (
            "cm: consistency training asks the teacher",
            ('if self.settings.variant == "ct":\n            return data_step'),
            ('if self.settings.variant == "ct" and self.solver == "heun":\n            return data_step'),
            "test_a_step_is_the_papers[vp-epsilon-ct-full-True]",
        ),
        (
            "cm: a grid of every table step has a hop of no length",
            "torch.from_numpy(np.unique(self.schedule.training_grid(grid_steps)))",
            "torch.from_numpy(self.schedule.training_grid(grid_steps))",
            "test_a_grid_of_every_table_step_has_no_empty_hop",
        ),
    ),
]
