"""Planted defects of the method reflow."""

from tests.mutants.mutant import planted

WINDOWS = "test_a_step_is_the_papers[vp-epsilon-windows-full]"
PAIRS = "test_a_step_is_the_papers[vp-epsilon-pairs-full]"
HEIGHTS = "test_heights_reach_down_from_the_noisy_end_of_every_window"
NEEDS = "test_pairs_alone_are_needed_in_one_window_and_data_alone_in_several"

MUTANTS = [
    *planted(
        "methods/reflow.py",
        "methods/test_reflow.py",
        ("reflow: pairs end at the schedule's end, not at clean data", '", or set windows"), self.schedule.clean',
         '", or set windows"), self.schedule.end', PAIRS),
        ("reflow: pairs begin at noise times sigma", "first_state(self.schedule, pairs.noise, top)",
         "first_state(self.schedule, pairs.noise, top, \"table\")", PAIRS),
        ("reflow: pairs have the data's captions", "pairs.x0, pairs.cond", "pairs.x0, batch.cond", PAIRS),
        ("reflow: a window is that above", "self.grid[window * steps : (window + 1) * steps + 1]",
         "self.grid[(window + 1) * steps : (window + 2) * steps + 1]", WINDOWS),
        ("reflow: the teacher is not guided",
         "down, scale, self.settings.solver)", "down, 1.0, self.settings.solver)", WINDOWS),
        ("reflow: the teacher always steps by DDIM", "down, scale, self.settings.solver)", "down, scale)",
         "test_a_step_is_the_papers[vp-epsilon-heun-full]"),
        ("reflow: lines begin at the data, noised, in their middle too", "x_top, below = step.x_t, step.x_u",
         "x_top, below = step.x_u, step.x_u", WINDOWS),
        ("reflow: the slope is not of the whole line", "/ (tau_top - tau_low)", "/ tau_top", WINDOWS),
        ("reflow: the point lies as far from clean data as the line is long", "level(schedule, t) - tau_low)",
         "level(schedule, t))", WINDOWS),
        ("reflow: heights count from the clean end",
         "height=1 - rng.sample.uniform", "height=rng.sample.uniform", HEIGHTS),
        ("reflow: windows are learnt whole", "self.settings.reach if several else 1.0", "1.0", HEIGHTS),
        ("reflow: whole trajectories are not learnt near clean data", "self.settings.reach if several else 1.0",
         "self.settings.reach", HEIGHTS),
        ("reflow: only the lowest window is learnt",
         "rng.shared.integer(\"window\", 0, self.count)", "0", HEIGHTS),
        ("reflow: windows meet on the grid of all solver steps",
         "np.unique(np.append(schedule.timesteps(windows).numpy(), schedule.end))",
         "schedule.training_grid(windows)", "test_windows_meet_where_their_sampler_calls_the_network"),
        ("reflow: solver steps of a window have one length in the native time",
         "grid = np.interp(inner, np.arange(len(knots)), knots)",
         "grid = np.interp(np.arange(len(knots)) / solver_steps, np.arange(len(edges)), edges)",
         "test_solver_times_within_windows_are_spaced_as_those_of_training_grids"),
        ("reflow: the teacher is asked at clean data", "heun and not only_first_order(self.schedule, t, u)", "heun",
         "test_the_teacher_is_not_asked_where_heuns_step_ends_at_clean_data"),
        ("reflow: pairs are made for windows too",
         "cls.streams if settings.windows == 1 else (\"data\",)", "cls.streams",
         NEEDS),
        ("reflow: windows can do without images",
         "return settings.windows > 1  # otherwise", "return False  # otherwise",
         NEEDS),
        ("reflow: windows are sampled in four steps", "settings.windows if settings.windows > 1 else 4", "4",
         "test_as_many_steps_as_windows"),
    ),
    *planted(
        "methods/parts/solver_step.py",
        "methods/test_reflow.py",
        ("solver step: heun asks the teacher at clean data", " and not only_first_order(schedule, t, u).all()", "",
         "test_the_teacher_is_not_asked_where_heuns_step_ends_at_clean_data"),
    ),
    *planted(
        "methods/base.py",
        "methods/test_reflow.py",
        ("base: streams do not depend on the settings", "self.streams = self.streams_of(self.settings)",
         "self.streams = type(self).streams", NEEDS),
    ),
]  # fmt: skip
