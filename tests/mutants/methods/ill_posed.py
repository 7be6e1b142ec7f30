"""Planted defects of what follows from a table that ends far below the signal."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "diffusion/well_posed.py",
        "diffusion/test_well_posed.py",
        (
            "first time: one index too noisy",
            "return float(usable[-1]) if",
            "return float(usable[-1] + 1) if",
            "test_a_student_starts_at_the_noisiest_index_where_an_error_weighs_15_at_most",
        ),
        (
            "first time: zero terminal SNR starts later too",
            "if not noise or schedule.alphas_cumprod[-1] == 0:",
            "if not noise:",
            "test_other_schedules_keep_their_start",
        ),
        (
            "first time: students that predict v start later too",
            'schedule.prediction_type == "epsilon" and schedule.family == "vp"',
            'schedule.family == "vp"',
            "test_students_that_do_not_predict_noise_keep_their_start",
        ),
        (
            "first time: Stable Diffusion's table starts later too",
            "LARGEST = 15.0",
            "LARGEST = 14.0",
            "test_other_schedules_keep_their_start",
        ),
        (
            "first time: the grid begins one index below it",
            "np.arange(n, 0, -1) * (first + 1) / n",
            "np.arange(n, 0, -1) * first / n",
            "test_the_times_are_the_trailing_grid_of_the_table_that_ends_there",
        ),
        (
            "first time: more steps than indices",
            " or n > first + 1",
            "",
            "test_a_table_with_fewer_usable_indices_than_steps_is_left_as_it_is",
        ),
    ),
    *planted(
        "methods/parts/distances.py",
        "methods/test_ill_posed.py",
        (
            "bounded rows: the mean square's weight is not squared",
            'return share**2 if kind == "l2" else share',
            "return share",
            "test_a_row_of_large_gain_moves_the_output_as_one_of_15",
        ),
        (
            "bounded rows: every row counts as 15",
            "LARGEST / np.maximum(gain, LARGEST)",
            "LARGEST / np.maximum(gain, 1e-9)",
            "test_a_row_of_large_gain_moves_the_output_as_one_of_15",
        ),
    ),
    *planted(
        "methods/tcd.py",
        "methods/test_tcd.py",
        (
            "bounded rows: tcd takes clean data for the end of its jump",
            "pred.gain(*self.schedule.alpha_sigma(shared.s))",
            "pred.gain()",
            "test_a_step_is_the_papers[edm-epsilon-unguided-full-True]",
        ),
    ),
    *planted(
        "diffusion/prediction.py",
        "methods/test_ill_posed.py",
        (
            "gain: alpha and sigma change places",
            "self._determinant, s * self._alpha - a * self._sigma",
            "self._determinant, s * self._sigma - a * self._alpha",
            "test_the_gain_is_what_one_more_in_the_output_changes",
        ),
    ),
    *planted(
        "methods/parts/score_pair.py",
        "methods/test_ill_posed.py",
        (
            "ill-posed levels: scores are compared above the first time",
            "last = max(first, min(last, self.usable - 1))",
            "pass",
            "test_scores_are_compared_up_to_the_first_time",
        ),
        (
            "ill-posed levels: a jump's end above the first time is noised downwards",
            "if high < 1 and (above is None or self._count(above) < self.usable):",
            "if high < 1:",
            "test_scores_are_compared_up_to_the_first_time",
        ),
        (
            "ill-posed: the fake score of every schedule learns faster",
            "return 4.0 if first_time(schedule) < schedule.start else 1.0",
            "return 4.0",
            "test_on_other_schedules_nothing_changes",
        ),
    ),
    *planted(
        "methods/dmd2.py",
        "methods/test_ill_posed.py",
        (
            "ill-posed: the card does not hear of the times",
            "self.settings = replace(self.settings, timesteps=self.default_times or None)",
            "pass",
            "test_dmd2_starts_where_its_schedule_allows_and_its_card_says_so",
        ),
        (
            "ill-posed: random times are given up",
            "if self.settings.timesteps is None and not self.settings.any_steps:",
            "if self.settings.timesteps is None:",
            "test_random_times_keep_the_schedules_start",
        ),
    ),
    *planted(
        "training/settings.py",
        "methods/test_ill_posed.py",
        (
            "ill-posed: the critic's share is forgotten",
            "peak = self.learning_rate * share",
            "peak = self.learning_rate",
            "test_the_critic_learns_four_times_as_fast_where_nothing_else_is_asked_for",
        ),
    ),
    *planted(
        "training/trainer.py",
        "methods/test_ill_posed.py",
        (
            "ill-posed: a resumed run says it again",
            "elif distributed.first():\n            self._remark()",
            "if distributed.first():\n            self._remark()",
            "test_it_is_said_once_at_the_start_and_not_on_resume",
        ),
    ),
    *planted(
        "training/remarks.py",
        "methods/test_ill_posed.py",
        (
            "ill-posed: it is said of networks that predict v, too",
            "schedule, student.prediction_type)",
            'schedule, "epsilon")',
            "test_there_is_none_where_all_is_well",
        ),
    ),
]
