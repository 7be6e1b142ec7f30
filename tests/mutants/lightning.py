"""Planted defects of Lightning, of the roles it brings, and of students that predict another kind."""

from tests.mutants.mutant import planted

STEP = "test_both_players_steps_are_the_papers[vp-epsilon-{}-full]"
METHOD = planted(
    "methods/lightning.py",
    "methods/test_lightning.py",
    (
        "lightning: the student jumps to the teacher's first step",
        "landing=said.at(hop.u)",
        "landing=said.at(times[1])",
        STEP.format("unconditional"),
    ),
    (
        "lightning: the teacher takes one step less",
        "for k in range(self.substeps + 1)]",
        "for k in range(max(self.substeps, 2))]",
        STEP.format("mse"),
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
        STEP.format("conditional"),
    ),
    (
        "lightning: terminal table is noise alone, too",
        "draws.noise, times[0], self.settings.terminal)",
        'draws.noise, times[0], "noise")',
        STEP.format("table"),
    ),
    (
        "lightning: the loss is in x0, not where both land",
        "error = distance(shared.landing, shared.x_u)",
        "error = distance(shared.x0, shared.teacher_x0)",
        STEP.format("mse"),
    ),
    (
        "lightning: a conversion compares landings",
        "loss = distance(shared.x0, shared.teacher_x0)",
        "loss = distance(shared.landing, shared.x_u)",
        STEP.format("convert"),
    ),
    (
        "lightning: a converted student predicts what its teacher does",
        '("sample" if settings.loss == "convert" else None)',
        "None",
        STEP.format("convert"),
    ),
    (
        "lightning: the unconditional discriminator sees the start",
        'beside=settings.loss == "conditional"',
        "beside=True",
        "tests/verification/test_verify.py::test_lightning_needs_no_training_to_be_verified",
    ),
    (
        "lightning: the student's grid is its teacher's, rounded elsewhere",
        "_grid(schedule, [settings.num_teacher_steps, self.starts, few])",
        "_grid(schedule, [self.starts, few, settings.num_teacher_steps])",
        "test_a_student_learns_where_it_will_be_sampled_and_its_teacher_was",
    ),
    (
        "lightning: students of two steps start from two times",
        "default = 4 if few in (1, 2) else few",
        "default = few",
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
)
LANDINGS = planted(
    "methods/parts/landings.py",
    "methods/test_lightning.py",
    (
        "landings: those on clean data are judged as they are",
        "torch.where(s <= self.schedule.end, self.levels",
        "torch.where(s > self.schedule.start, self.levels",
        "test_landings_on_clean_data_are_judged_where_the_paper_says",
    ),
    (
        "landings: every one is noised",
        "torch.where(s <= self.schedule.end, self.levels",
        "torch.where(s <= self.schedule.start, self.levels",
        "test_landings_on_clean_data_are_judged_where_the_paper_says",
    ),
    (
        "landings: those on the lowest time of a table are not noised",
        "torch.where(s <= self.schedule.end, self.levels",
        "torch.where(s == self.schedule.clean, self.levels",
        "tests/methods/test_hyper.py::test_both_players_steps_are_the_papers[vp-epsilon-later-full]",
    ),
    (
        "landings: t* are one level too high",
        ".astype(np.int64) - 1",
        ".astype(np.int64)",
        "test_landings_on_clean_data_are_judged_where_the_paper_says",
    ),
    (
        "landings: t* are drawn alike whatever their weights",
        "share = torch.tensor(weights, dtype=torch.float64)",
        "share = torch.ones(len(weights), dtype=torch.float64)",
        "test_landings_on_clean_data_are_judged_where_the_paper_says",
    ),
    (
        "landings: each has a noise of its own",
        "seen = renoise(self.schedule, real, s, shown.at, shown.noise)",
        "seen = renoise(self.schedule, real, s, shown.at, shown.noise.flip(0))",
        STEP.format("unconditional"),
    ),
    (
        "landings: the discriminator is told where they lie, not where they are noised to",
        "leaf, self.game.features(roles, leaf, at, cond))",
        "leaf, self.game.features(roles, leaf, s.clamp_min(0), cond))",
        STEP.format("unconditional"),
    ),
    (
        "landings: the start is seen at the time of the landing",
        "self.game.features(roles, *start, cond)",
        "self.game.features(roles, start[0], at, cond)",
        STEP.format("conditional"),
    ),
    (
        "landings: the start goes before the landing",
        "torch.cat(pair, dim=1)",
        "torch.cat(pair[::-1], dim=1)",
        STEP.format("conditional"),
    ),
    (
        "landings: the discriminator learns nothing of where they started",
        "shown.beside = self.game.features(roles, *start, cond)",
        "shown.beside = [f.detach() for f in self.game.features(roles, *start, cond)]",
        STEP.format("conditional"),
    ),
    (
        "landings: real and fake change places",
        "self.game.verdict(logits, self._logits(roles, shown.features, shown))",
        "self.game.verdict(self._logits(roles, shown.features, shown), logits)",
        STEP.format("unconditional"),
    ),
    (
        "landings: the student is pleased to be found out",
        "return with_gradient(adversarial, shown.seen, pull), pull",
        "return with_gradient(adversarial, shown.seen, -pull), pull",
        STEP.format("unconditional"),
    ),
    (
        "landings: the backbone learns nothing of fakes",
        "self.game.verdict(logits, self._logits(roles, shown.features, shown))",
        "self.game.verdict(logits, self._logits(roles, [f.detach() for f in shown.features], shown))",
        STEP.format("unconditional"),
    ),
    (
        "landings: heads are hinged",
        'Discriminator("logistic", BACKBONE',
        'Discriminator("hinge", BACKBONE',
        STEP.format("unconditional"),
    ),
)
ROLES = planted(
    "models/roles.py",
    "methods/test_lightning.py",
    (
        "roles: a discriminator begins as the stage's teacher",
        "(origin or self._teacher).network",
        "self._teacher.network",
        "test_the_discriminator_begins_as_the_first_model_and_leaves_it_alone",
    ),
    (
        "roles: a discriminator trains the first model itself",
        "        network = self._copy(network)\n        drop",
        "        drop",
        "test_the_discriminator_begins_as_the_first_model_and_leaves_it_alone",
    ),
    (
        "roles: a discriminator keeps its decoder",
        "        if drop is not None:\n            drop()\n",
        "",
        "test_the_discriminator_begins_as_the_first_model_and_leaves_it_alone",
    ),
    (
        "roles: a student is read as its teacher whatever it predicts",
        "kind or like.prediction_type",
        "like.prediction_type",
        STEP.format("convert"),
    ),
)
KINDS = [
    *planted(
        "students/student.py",
        "runs/test_distill_lightning.py",
        (
            "export: a student is loaded as its teacher's kind",
            "prediction_type=card.prediction_type or None",
            "prediction_type=None",
            "test_a_student_may_predict_another_kind_than_its_teacher",
        ),
    ),
    *planted(
        "students/lineage.py",
        "runs/test_distill_lightning.py",
        (
            "chain: a student becomes a teacher of its own teacher's kind",
            "kind = card.prediction_type or teacher.denoiser.prediction_type",
            "kind = teacher.denoiser.prediction_type",
            "test_a_student_may_predict_another_kind_than_its_teacher",
        ),
        (
            "chain: discriminators begin as the student in between",
            "load_teacher(first_teacher(folder)).denoiser",
            "open_teacher(name).denoiser",
            "test_a_discriminator_begins_as_the_first_model_whoever_teaches",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_distill_lightning.py",
        (
            "job: weights are read as another kind without a word",
            "if before and before != mine:",
            "if before and False:",
            "test_weights_of_one_kind_are_not_read_as_another",
        ),
        (
            "job: the card does not say what a student predicts",
            "prediction_type=self.roles.student.prediction_type",
            'prediction_type=""',
            "test_a_student_may_predict_another_kind_than_its_teacher",
        ),
    ),
    *planted(
        "runs/chain.py",
        "runs/test_distill_lightning.py",
        (
            "stages: a teacher of few steps is asked for others",
            "many not in (None, teacher.sample.num_inference_steps)",
            "False",
            "test_a_teacher_is_asked_on_the_grid_it_learnt",
        ),
    ),
    *planted(
        "models/families/unet.py",
        "runs/test_distill_lightning.py",
        (
            "families: a UNet's decoder stays",
            "        unet.up_blocks = nn.ModuleList()\n",
            "",
            "test_a_discriminator_has_no_decoder",
        ),
    ),
]
LIGHTNING = [*METHOD, *LANDINGS, *ROLES, *KINDS]
