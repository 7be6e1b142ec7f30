"""Planted defects of the method lightning."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/lightning.py",
        "methods/test_lightning.py",
        (
            "lightning: the student jumps to the teacher's first step",
            "x_student=pred.at(step.u)",
            "x_student=pred.at(times[1])",
            "test_both_players_steps_are_the_papers[vp-epsilon-unconditional-full]",
        ),
        (
            "lightning: the teacher takes one step less",
            "for k in range(self.substeps + 1)]",
            "for k in range(max(self.substeps, 2))]",
            "test_both_players_steps_are_the_papers[vp-epsilon-mse-full]",
        ),
        (
            "lightning: a way past clean data is not held there",
            "(first + k * stride).clamp_max(last)",
            "(first + k * stride) % len(self.grid)",
            "test_students_of_one_and_two_steps_start_from_four_times",
        ),
        (
            "lightning: data shows through at the noisiest time",
            "x_t = noised_rows(self.schedule, batch.x0, draws.noise, times[0], self.settings.terminal)",
            "x_t = self.schedule.add_noise(batch.x0, draws.noise, times[0])",
            "test_both_players_steps_are_the_papers[vp-epsilon-conditional-full]",
        ),
        (
            "lightning: terminal table is noise alone, too",
            "draws.noise, times[0], self.settings.terminal)",
            'draws.noise, times[0], "noise")',
            "test_both_players_steps_are_the_papers[vp-epsilon-table-full]",
        ),
        (
            "lightning: the loss is in x0, not where both land",
            "error = distance(shared.x_student, shared.x_u)",
            "error = distance(shared.x0, shared.teacher_x0)",
            "test_both_players_steps_are_the_papers[vp-epsilon-mse-full]",
        ),
        (
            "lightning: a conversion compares landings",
            "loss = distance(shared.x0, shared.teacher_x0)",
            "loss = distance(shared.x_student, shared.x_u)",
            "test_both_players_steps_are_the_papers[vp-epsilon-convert-full]",
        ),
        (
            "lightning: a converted student predicts what its teacher does",
            '("sample" if settings.loss == "convert" else None)',
            "None",
            "test_both_players_steps_are_the_papers[vp-epsilon-convert-full]",
        ),
        (
            "lightning: the unconditional discriminator sees the start",
            'beside=settings.loss == "conditional"',
            "beside=True",
            "tests/verification/test_closed_forms.py::test_lightning_against_closed_forms",
        ),
        (
            "lightning: the student's grid is its teacher's, rounded elsewhere",
            "_grid(schedule, [settings.num_teacher_steps, self.starts, few])",
            "_grid(schedule, [self.starts, few, settings.num_teacher_steps])",
            "test_a_student_learns_where_it_will_be_sampled_and_its_teacher_was",
        ),
        (
            "lightning: students of two steps start from two times",
            "default = 4 if self.num_inference_steps in (1, 2) else self.num_inference_steps",
            "default = self.num_inference_steps",
            "test_students_of_one_and_two_steps_start_from_four_times",
        ),
        (
            "lightning: students are sampled in four steps whatever they learnt",
            "return Sampling(settings.num_inference_steps, no_other_steps=True)",
            "return Sampling(4, no_other_steps=True)",
            "tests/runs/test_distill_lightning.py::test_every_stage_leaves_a_student_of_its_own_steps",
        ),
        (
            "lightning: other numbers of steps are let pass",
            "return Sampling(settings.num_inference_steps, no_other_steps=True)",
            "return Sampling(settings.num_inference_steps)",
            "test_without_a_discriminator_there_is_one_player",
        ),
    ),
]
