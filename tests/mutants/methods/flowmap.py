"""Planted defects of the method flowmap and of slopes."""

from tests.mutants.mutant import planted

STEP = "test_a_step_is_the_papers[vp-epsilon-drawn scale-full]"
ROWS = "test_rows_are_shared_between_the_diagonal_the_whole_way_and_all_others"
CALL = "roles.student(shared.x_t, draws.t, batch.cond, end=draws.end)"
EXACT = "test_at_the_exact_flow_map_the_loss_falls_as_the_third_power_of_alpha"

MUTANTS = [
    *planted(
        "methods/flowmap.py",
        "methods/test_flowmap.py",
        ("flowmap: the shares of both parts are swapped", "expand(share, rest))", "expand(1 - share, rest))", EXACT),
        ("flowmap: the second part begins where the first did", "roles.student(first.at(s), s,",
         "roles.student(x_t, s,", EXACT),
        ("flowmap: the second part is predicted at t", "roles.student(first.at(s), s,",
         "roles.student(first.at(s), draws.t,", EXACT),
        ("flowmap: the second part ends at t", "batch.cond, end=draws.end).flow",
         "batch.cond, end=draws.t).flow", STEP),
        ("flowmap: r and t are swapped in the student's call", CALL,
         "roles.student(shared.x_t, draws.end, batch.cond, end=draws.t)", STEP),
        ("flowmap: the target keeps its graph", "        with torch.no_grad():\n            x_t =",
         "        if True:\n            x_t =", STEP),
        ("flowmap: the teacher is not guided", "batch.cond, guidance_scale=scale)", "batch.cond)", STEP),
        ("flowmap: the whole way ends above the schedule's end", "torch.where(whole, 0.0, high)",
         "torch.where(whole, LOWEST, high)", "tests/methods/test_ends.py::"
         "test_the_ends_of_sampling_are_those_of_training[flowmap-flow]"),
        ("flowmap: a row that ends at t has a first part", "np.where(high == low, 1.0, (high",
         "np.where(high > 2, 1.0, (high", STEP),
        ("flowmap: the share is alpha where a table has no time", "(high - level(self.schedule, s)) / way)", "alpha)",
         "test_the_share_is_that_of_the_time_which_a_table_has"),
        ("flowmap: jumps learn ever less as alpha falls", "self.settings.alpha[0] / draws.alpha * parts", "parts",
         "test_jumps_learn_as_fast_as_alpha_falls"),
        ("flowmap: the diagonal is weighted, too",
         'total = parts["diagonal"] + self', 'total = parts["diagonal"] / draws.alpha + self',
         STEP),
        ("flowmap: alpha does not fall", "min(1.0, progress.step / (FALLING * progress.total))", "0.0",
         "test_alpha_falls_geometrically_and_then_stays"),
        ("flowmap: alpha falls until the last step", "FALLING = 0.8", "FALLING = 1.0",
         "test_alpha_falls_geometrically_and_then_stays"),
        ("flowmap: the shares of the rows are swapped", "kind >= 1 - self.settings.diagonal",
         "kind >= self.settings.diagonal",
         ROWS),
        ("flowmap: t lies below the end", "torch.where(between, torch.maximum(one, two), one)",
         "torch.where(between, torch.minimum(one, two), one)",
         ROWS),
        ("flowmap: the data's slope leads to noise's other side", "draws.noise - batch.x0", "batch.x0 - draws.noise",
         "test_a_step_is_the_papers[flow-flow-data-full]"),
    ),
    *planted(
        "methods/parts/slopes.py",
        "methods/test_flowmap.py",
        ("slopes: the level is sigma over alpha", "np.asarray(sigma / (alpha + sigma))",
         "np.asarray(sigma / alpha)", STEP),
        ("slopes: a network that predicts x0 is compared by its slope", 'prediction_type == "sample"',
         'prediction_type == "x0"', "test_a_step_is_the_papers[vp-sample-unguided-full]"),
        ("slopes: rows of a large gain are all that a batch teaches", "return errors if weight is None else",
         "return errors if True else", STEP),
        ("slopes: heights are shares of the native time",
         "np.interp(height.numpy(), np.linspace(0, 1, steps + 1), grid)",
         "schedule.end + height.numpy() * (schedule.start - schedule.end)",
         f"{ROWS}[flow]"),
    ),
    *planted(
        "sampling/samplers.py",
        "methods/test_ends.py",
        ("sampling: a jump to clean data is conditioned on the next time",
         "        return float(schedule.end)\n\n    def step(self, at: Step) -> Tensor:\n        x0 = at.prediction.x0",
         "        return next_time\n\n    def step(self, at: Step) -> Tensor:\n        x0 = at.prediction.x0",
         "test_a_jump_to_clean_data_ends_there"),
    ),
]  # fmt: skip

MUTANTS += [
    *planted(
        "methods/parts/rollout.py",
        "methods/test_dmd2_ends.py",
        ("rollout: a jump of a simulation has no end",
         "end=self.end(student, times[i + 1])", "end=self.end(student, times[i])",
         "test_each_call_is_conditioned_on_where_its_jump_goes[settings1-vp]"),
        ("rollout: an end lies below the schedule's", "return max(time, self.schedule.end) if", "return time if",
         "test_each_call_is_conditioned_on_where_its_jump_goes[settings1-vp]"),
        ("rollout: noised predictions are jumps to the next time", 'if self.move == "ode" else self.schedule.end',
         'if self.move == "ode" else time', "test_each_call_is_conditioned_on_where_its_jump_goes[settings0-vp]"),
    ),
    *planted(
        "methods/dmd2.py",
        "methods/test_dmd2_ends.py",
        ("distribution matching: the call that learns is conditioned on clean data",
         "to = self.rollout.next_time(draws)", "to = self.schedule.clean",
         "test_each_call_is_conditioned_on_where_its_jump_goes[settings1-vp]"),
        ("distribution matching: jumps that nobody learns are asked for",
         'if self.tell_end and self.rollout == "ode" and self.match == "x0" and self.most_steps > 1:', "if False:",
         "tests/methods/test_dmd2.py::test_refusals"),
        ("first step: it is fitted to an end that no sampler asks for",
         "if self.tell_end and self.first_weight:", "if False:", "tests/methods/test_dmd2.py::test_refusals"),
        ("random times: a student is sampled in more steps than it knows",
         "min(settings.num_inference_steps, settings.any_steps),", "settings.num_inference_steps,",
         "tests/methods/test_ends.py::test_the_times_of_samplers_lie_within_those_that_are_drawn"),
    ),
]  # fmt: skip
