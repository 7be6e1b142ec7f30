"""Planted defects of verification."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "verification/fixed_points.py",
        "verification/test_fixed_points.py",
        (
            "fixed points: CT's noise at the lower time is drawn anew",
            "below = self._look_up(n - 1, of_x * x[:, None, None] + of_x0 * x0)",
            "below = self._look_up(n - 1, float(self.alpha[n - 1]) * x0)",
            "test_ct_is_the_conditional_mean",
        ),
        (
            "fixed points: CT's clean data lie at their mean",
            "* sigma * self.nodes",
            "* 0 * self.nodes",
            "test_ct_is_the_conditional_mean",
        ),
        (
            "fixed points: CD walks by DDIM whatever its solver",
            "cond, self.guidance_scale, self.solver)",
            'cond, self.guidance_scale, "ddim")',
            "test_cd_answers_with_heun_steps_composed",
        ),
        (
            "fixed points: TCD's secants are weighted by b, not by its square",
            "weight = of_mine / (of_mine**2).sum()",
            "weight = np.sign(of_mine) / np.abs(of_mine).sum()",
            "test_tcd_figures[50 hops]",
        ),
        (
            "fixed points: TCD never ends where the teacher landed",
            "for s in self.ends if floor <= s < m]",
            "for s in self.ends if floor <= s < max(m - 1, 1)]",
            "test_tcd_is_the_least_squares_table",
        ),
        (
            "fixed points: LCM's teacher walks from a grid time too low",
            "self._clean(n, x, self._down(n, 0, x, cond)[-1])",
            "self._clean(n, x, self._down(n - 1, 0, x, cond)[-1])",
            "test_lcm_answers_with_the_composed_teacher",
        ),
        (
            "fixed points: PCM's solver steps that end on an edge go on to the one below",
            "edge = int(self.lower[self.lower < n].max())",
            "edge = int(self.lower[self.lower < max(n, 2) - 1].max(initial=0))",
            "test_pcm_is_the_table_of_edge_points",
        ),
        (
            "fixed points: CTM's trajectories stop one solver step early",
            "self._down(start, last, x, cond)[-1])",
            "self._down(start, last + (start > last + 1), x, cond)[-1])",
            "tests/verification/test_verify.py::test_ctms_contract_and_table_hold_on_every_schedule",
        ),
        (
            "fixed points: a segment's targets reach into the next one",
            "floor = (m - 1) // self.stride * self.stride",
            "floor = 0",
            "tests/verification/test_verify.py::test_hypers_segments_and_fixed_points_hold_on_every_schedule[vp]",
        ),
    ),
    *planted(
        "verification/dmd.py",
        "verification/test_verify_dmd.py",
        (
            "verify dmd: fresh data are held against data, the student is not looked at",
            "0.0, sliced_w2(samples, data), limit",
            "0.0, sliced_w2(other, data), limit",
            "test_a_student_that_has_learnt_nothing_is_seen",
        ),
        (
            "verify dmd: the pairs are met from new noise",
            "met = sample(roles.student, student, made.noise.float(), made.cond).x0",
            "met = made.x0",
            "test_a_student_that_has_learnt_nothing_is_seen",
        ),
        (
            "verify dmd: the solver's rows are left out",
            "if bench.guidance_scale != 1.0:\n        return []\n    batch",
            "if bench.guidance_scale != 0.0:\n        return []\n    batch",
            "test_the_solver_is_a_fixed_point_of_both_terms",
        ),
    ),
]
