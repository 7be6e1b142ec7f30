"""Planted defects of what dmd2 can do beside its paper: rollouts on the ODE, jumps, random times, guidance apart."""

from tests.mutants.mutant import planted

HAND = "tests/methods/test_dmd2.py::test_both_players_steps_are_the_papers"
JUMPS = f"{HAND}[vp-epsilon-jumps-full]"
EXACT = f"{HAND}[vp-v_prediction-jumps, exact score-full]"
TDM = "test_a_jump_lands_on_the_teachers_marginal_with_the_exact_score_and_wider_with_the_released_target"
APART = "test_guidance_apart_moves_the_mean_as_the_closed_form_says"
PULL = "test_the_trainer_pulls_the_fake_score_after_the_students_update"
FIRST = "test_a_first_step_with_the_teachers_mean_slope_has_no_loss"
TIMES = "test_times_of_a_jump_lie_between_its_two_and_those_of_guidance_below_the_student"
ENDS = "tests/methods/test_ends.py::test_the_times_of_samplers_lie_within_those_that_are_drawn"
GRIDS = "test_random_times_begin_with_the_start_and_are_levels_without_their_ends"

MUTANTS = [
    *planted(
        "methods/parts/rollout.py",
        "verification/test_dmd2_switches.py",
        (
            "rollout: calls on the ODE are noised afresh",
            'if self.move == "ode":',
            'if self.move == "":',
            "tests/methods/test_dmd2.py::test_a_student_on_the_ode_is_trained_where_its_sampler_passes",
        ),
        (
            "rollout: a jump leads two times down",
            "(*draws.times, float(self.schedule.clean))[draws.exit + 1]",
            "(*draws.times, float(self.schedule.clean), float(self.schedule.clean))[draws.exit + 2]",
            "tests/methods/test_dmd2.py::test_a_student_on_the_ode_is_trained_where_its_sampler_passes",
        ),
        (
            "rollout: the last jump ends where the table does",
            "float(self.schedule.clean))[draws.exit",
            "float(self.schedule.end))[draws.exit",
            "tests/methods/test_dmd2.py::test_a_student_on_the_ode_is_trained_where_its_sampler_passes",
        ),
        (
            "rollout: every row has random times of its own rank",
            'rng.shared.integer(f"inner_time/{i}", low, high + 1)',
            'int(rng.sample.integers(f"inner_time/{i}", low, high + 1)[0])',
            "test_every_row_and_process_has_the_same_random_times",
        ),
        ("rollout: there are always as many random times", 'rng.shared.integer("steps", self.first_exit + 1, ',
         'rng.shared.integer("steps", self.any_steps, ', GRIDS),
        ("rollout: random times do not begin with noise", "return (float(self.schedule.start), *(",
         "return (float(levels[high]), *(", GRIDS),
        ("rollout: random times go up", "sorted(inner, reverse=True)", "sorted(inner)", GRIDS),
        ("rollout: random times stop above a sampler's last", "        return max(low, 0), min(high, len(levels) - 2)",
         "        return int(MATCHED[0] * len(levels)), min(high, len(levels) - 2)", ENDS),
        ("rollout: random times stop below a sampler's second",
         "        return max(low, 0), min(high, len(levels) - 2)",
         "        return max(low, 0), int(MATCHED[1] * len(levels))", ENDS),
        ("rollout: a first step of its own is matched, too", "self.first_exit, steps)", "0, steps)",
         "test_the_matching_reaches_no_first_step"),
        ("rollout: the mean number of calls is that of fixed times", "if not self.any_steps:\n            return (self",
         "if True:\n            return (self", GRIDS),
    ),
    *planted(
        "methods/parts/score_pair.py",
        "verification/test_dmd2_switches.py",
        ("score pair: jumps are noised as clean predictions", "        if jump is None:\n            return",
         "        if True:\n            return", JUMPS),
        ("score pair: the fake score learns noise that is all fresh",
         "expand(np.asarray(sigma / fresh), noise) * noise,",
         "noise,", TDM),
        ("score pair: the exact target forgets the jump's own noise",
         "- expand(np.asarray(alpha * ratio**2 / fresh), x_s) * noise",
         "", EXACT),
        ("score pair: the exact target is not weighted",
         "np.asarray((fresh / sigma) ** 2)", "np.ones_like(fresh)", EXACT),
        ("score pair: what the fake score learns of jumps holds fresh noise alone",
         "noise = (x_t - expand(alpha, x) * x) / expand(sigma, x)", "noise = noise", JUMPS),
        ("score pair: guidance acts at a level noisier than a late time",
         "(max(min(first, last), 0), max(last, 0)) if above is None else (first, max(first, last))",
         "(first, max(first, last))",
         "test_guidance_acts_no_noisier_than_a_late_time_of_the_student"),
        ("score pair: times of a jump begin below its end", "first = min(max(first, self._count(above)), count - 1)",
         "first = min(max(first, self._count(above) - 1), count - 1)", TIMES),
        ("score pair: times of a jump end above its start", "min(last, self._count(upto) - 1)",
         "min(last, self._count(upto))", TIMES),
    ),
    *planted(
        "methods/parts/matching.py",
        "verification/test_dmd2_switches.py",
        ("matching: guidance apart counts w, not w - 1", "added = difference(guided, plain)",
         "added = difference(guided, plain) * scale / (scale - 1)", APART),
        ("matching: guidance apart has the other sign",
         "gradient = gradient - self.guidance(", "gradient = gradient + self.guidance(",
         APART),
        ("matching: guidance acts apart and in the matching",
         "self.compared = ScorePair(schedule, 1.0, settings.weighting)",
         "pass", APART),
        ("matching: guidance acts at levels noisier than the student's", '"guidance_time", *MATCHED, upto=t)',
         '"guidance_time", *MATCHED, above=t)', TIMES),
        ("matching: guidance apart is not normalised", "return over_distance(added, working(x), plain.x0) if",
         "return added if", f"{HAND}[vp-epsilon-guidance apart-full]"),
        ("matching: jumps are compared at all levels", 'if self.match == "x_s" else (None, None)',
         'if self.match == "" else (None, None)', TIMES),
        ("matching: jumps keep the student's graph", "Jump(pred.at(s).detach(), s)", "Jump(pred.at(s), s)",
         "test_a_jump_has_no_graph"),
    ),
    *planted(
        "methods/parts/first_step.py",
        "verification/test_dmd2_switches.py",
        ("first step: its target lies on another grid", "grid = schedule.timesteps(total).double()",
         "grid = schedule.timesteps(total + 1).double()", FIRST),
        ("first step: one solver step too many", "below = grid[grid < first][: self.solver_steps]",
         "below = grid[grid < first][: self.solver_steps + 1]", FIRST),
        ("first step: it is fitted at the schedule's start", "torch.tensor([first], dtype",
         "torch.tensor([schedule.start], dtype",
         "tests/methods/test_dmd2.py::test_the_first_step_is_fitted_where_the_student_meets_noise"),
        ("first step: its error is one of the state", "slope(x, start, reached, end), slope(x, start, wanted, end)",
         "reached, wanted", FIRST),
        ("first step: the teacher is not guided", "solve(roles.teacher, x, self.times, cond, self.guidance_scale)",
         "solve(roles.teacher, x, self.times, cond)", f"{HAND}[vp-epsilon-first step-full]"),
    ),
    *planted(
        "models/roles.py",
        "verification/test_dmd2_switches.py",
        ("roles: a pulled role goes all the way but its share", "self._followers[name] = source, 1 - share",
         "self._followers[name] = source, share", "test_a_pull_multiplies_what_the_critic_leaves"),
        ("roles: a pulled role may be of another kind",
         "if len(types) > 1 or next(shapes) != next(shapes):", "if False:",
         "test_roles_of_different_kinds_are_not_pulled"),
    ),
    *planted(
        "methods/dmd2.py",
        "methods/test_dmd2.py",
        ("distribution matching: no guidance is a term of its own",
         "if self.guidance_apart and self.guidance_scale == 1:", "if False:", "test_refusals"),
    ),
    *planted(
        "training/players.py",
        "verification/test_dmd2_switches.py",
        ("players: a late player has no warm-up", "self.player.rate, self.player.start)", "self.player.rate)",
         "test_a_late_student_warms_up_over_its_own_steps"),
    ),
    *planted(
        "runs/fit.py",
        "methods/test_dmd2.py",
        ("job: a flow map becomes a student without its end", "_check_extras(recipe, method, start)\n    _check_times",
         "_check_times", "test_a_flow_map_is_continued_with_its_end_alone"),
    ),
    *planted(
        "training/trainer.py",
        "verification/test_dmd2_switches.py",
        ("trainer: a fake score is never pulled", "if spec.pulled_to is not None:", "if False:", PULL),
    ),
    *planted(
        "methods/base.py",
        "verification/test_dmd2_switches.py",
        ("methods: a player that starts later is due before", "return step >= self.start and (step", "return (step",
         "test_a_student_that_starts_later_lets_the_critic_learn_alone"),
    ),
]  # fmt: skip
