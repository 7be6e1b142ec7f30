"""Planted defects of runs."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "recipe/chain.py",
        "runs/test_chain.py",
        (
            "stages: keys above win over the stage's own",
            "merged[key] = value\n",
            "merged.setdefault(key, value)\n",
            "test_keys_above_hold_for_every_stage_and_overrides_reach_each",
        ),
        (
            "stages: another method inherits the settings of the one above",
            "not _names_another(key, old, value)",
            "True",
            "test_keys_above_hold_for_every_stage_and_overrides_reach_each",
        ),
        (
            "stages: a teacher of few steps is asked for others",
            "many not in (None, teacher.sample.num_inference_steps)",
            "False",
            "tests/runs/test_distill_lightning.py::test_a_teacher_is_asked_on_the_grid_it_learnt",
        ),
    ),
    *planted(
        "recipe/chain.py",
        "cases/test_chains.py",
        (
            "stages: a LoRA starts on another teacher than its own",
            "if start.under != teacher and {start.under, teacher} & made.keys():",
            "if False:",
            "test_what_the_words_of_a_chain_tell_is_refused_when_it_is_read",
        ),
        (
            "stages: LoRAs of different layers are joined",
            "if below.targets != source.targets:",
            "if False:",
            "test_what_the_words_of_a_chain_tell_is_refused_when_it_is_read",
        ),
        (
            "stages: a joined LoRA stands on the stage that it holds",
            "source.targets, below.under)",
            "source.targets, source.under)",
            "test_stacked_loras_join_into_one_on_the_first_model",
        ),
    ),
    *planted(
        "runs/chain.py",
        "cases/test_chains.py",
        (
            "stages: a later one is refused when its turn comes, hours later",
            "    foresee(chain)\n",
            "",
            "test_what_a_later_stage_would_be_refused_for_is_said_before_the_first",
        ),
    ),
    *planted(
        "runs/foresee.py",
        "cases/test_chains.py",
        (
            "plan: a stage that is conditioned on more may teach",
            "cards[recipe.teacher.path] if recipe.teacher.path in cards else card_at(recipe.teacher.path)",
            "card_at(recipe.teacher.path)",
            "test_what_a_later_stage_would_be_refused_for_is_said_before_the_first",
        ),
        (
            "plan: what this machine lacks is not said",
            "found.append(str(error))",
            "pass",
            "test_what_this_machine_lacks_is_known",
        ),
    ),
    *planted(
        "runs/setup.py",
        "cases/test_chains.py",
        (
            "init: the teacher's LoRA is refused, or counted twice",
            "if init is not None and same_student(init, source):",
            "if False:",
            "test_a_stage_whose_init_is_its_teacher_begins_as_its_teacher",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_chain.py",
        (
            "stages: earlier ones cost nothing",
            "filter(None, (student_folder(Path(place)) for place in sorted(places)))",
            "filter(None, ())",
            "test_every_stage_leaves_a_student",
        ),
        (
            "stages: what two later ones begin with is paid twice",
            "costs |= card.costs or",
            "costs |= {text_hash(repr(card)): card.forward_equivalents} or",
            "test_every_stage_leaves_a_student",
        ),
    ),
    *planted(
        "runs/fit.py",
        "runs/test_chain.py",
        (
            "distill: the card forgets the guidance that a student was left with",
            "guidance_scale=wanted.guidance_scale,",
            "",
            "tests/runs/test_distill_pcm.py::test_normal_cfg_students_keep_their_guidance",
        ),
        (
            "job: weights are read as another kind without a word",
            "if before and before != mine:",
            "if before and False:",
            "tests/runs/test_distill_lightning.py::test_weights_of_one_kind_are_not_read_as_another",
        ),
        (
            "job: the card does not say what a student predicts",
            "prediction_type=spec.prediction_type or kind,",
            'prediction_type="",',
            "tests/runs/test_distill_lightning.py::test_a_student_may_predict_another_kind_than_its_teacher",
        ),
        (
            "job: the recipe's sampler is not the card's",
            "sampler=recipe.sample.sampler or method.sampler",
            "sampler=method.sampler",
            "tests/runs/test_distill_hyper.py::test_times_of_the_method_go_with_as_many_steps_alone",
        ),
        (
            "job: one time of the method's for two steps of another sampler",
            "recipe.sample.sampler is None or len(wanted.timesteps) == few",
            "True",
            "tests/runs/test_distill_hyper.py::test_times_of_the_method_go_with_as_many_steps_alone",
        ),
        (
            "job: feedback draws from its student by another sampler",
            "method.continues and card.sampler != method.sampler",
            "False",
            ("tests/runs/test_distill_feedback.py::test_what_does_not_fit_is_one_sentence_before_anything_is_written"),
        ),
    ),
    *planted(
        "runs/validation.py",
        "runs/test_chain.py",
        (
            "watch: high accuracy is bad",
            'sign = -1 if self.settings.metric == "accuracy" else 1',
            "sign = 1",
            "test_the_best_student_is_kept_and_patience_ends_the_run[accuracy]",
        ),
        (
            "watch: patience is one longer",
            "return 0 < self.settings.patience <= waited",
            "return 0 < self.settings.patience < waited",
            "test_the_best_student_is_kept_and_patience_ends_the_run[FD]",
        ),
    ),
    *planted(
        "runs/folder.py",
        "runs/test_distill.py",
        (
            "resume: a run made longer passes for finished",
            "            (self.student / CARD_FILE).unlink(missing_ok=True)\n",
            "",
            "test_a_run_made_longer_and_interrupted_is_not_finished",
        ),
        (
            "resume: the spelling of a recipe counts",
            "return done and self._stored_for(recipe) == recipe.as_data()",
            "return done and self.recipe.read_text() == recipe.as_yaml()",
            "tests/runs/test_folder.py::test_a_finished_run_is_known_by_its_recipes_values_not_by_their_spelling",
        ),
        (
            "resume: former names of settings are strangers",
            '{cls.renamed.get(key, key): value for key, value in stored["method"].items()}',
            'dict(stored["method"])',
            "tests/runs/test_folder.py::test_settings_of_a_stored_recipe_may_have_former_names",
        ),
    ),
    *planted(
        "recipe/resume.py",
        "runs/test_folder.py",
        (
            "resume: any key may change",
            "if not may_change(key) and old.get(key) != new.get(key):",
            "if not may_change(key) and old.keys() != new.keys():",
            "test_what_may_not",
        ),
        (
            "resume: a longer cosine is another curve without a word",
            'if recipe.training.lr_schedule == "cosine":',
            "if False:",
            "tests/cases/test_resuming.py::test_what_a_longer_run_means_is_said",
        ),
        (
            "resume: a longer run of a method that counts its steps is another run without a word",
            "if recipe.method_class().depends_on_length(recipe.method_settings()):",
            "if False:",
            "tests/cases/test_resuming.py::test_what_a_longer_run_means_is_said",
        ),
    ),
    *planted(
        "runs/dataset.py",
        "cases/test_resuming.py",
        (
            "resume: other images and captions, without a word",
            "if before not in (None, now):",
            "if False:",
            "test_a_run_does_not_go_on_with_other_data",
        ),
        (
            "resume: data that were never trained on may not change",
            "if checkpoint.latest(run.folder.checkpoints) is None:",
            "if False:",
            "test_data_may_change_until_the_first_checkpoint",
        ),
    ),
    *planted(
        "runs/distill.py",
        "runs/test_teacher_samples.py",
        (
            "distill: pairs cost nothing",
            "run.sampled = pairs.cost",
            "run.sampled = 0.0",
            "test_a_run_that_needs_pairs_makes_them_first_and_counts_them",
        ),
        (
            "distill: the folder is claimed before its pairs are looked at",
            "    wanted = pair_files(run, shared)\n    run.folder.claim(run.recipe.as_yaml())\n",
            "    run.folder.claim(run.recipe.as_yaml())\n    wanted = pair_files(run, shared)\n",
            "test_stale_samples_are_refused_and_the_folder_is_left_alone",
        ),
    ),
    *planted(
        "runs/dataset.py",
        "runs/test_teacher_samples.py",
        (
            "distill: the teacher's samples as data are pictures after all",
            'of_teacher = pairs is not None and recipe.data.source == "teacher"',
            "of_teacher = False",
            "test_any_method_trains_on_the_teachers_samples",
        ),
        (
            "distil: rewards get no captions",
            '_with_prompts(data, run, of_teacher) if "prompts" in streams else data',
            "data",
            "tests/runs/test_distill_feedback.py::test_prompts_of_the_pictures_reach_the_rewards",
        ),
    ),
    *planted(
        "runs/teacher_samples.py",
        "runs/test_teacher_samples.py",
        (
            "prepare: the teacher is not guided",
            "x0 = sample(teacher, solver, noise, cond, settings.guidance_scale).x0",
            "x0 = sample(teacher, solver, noise, cond).x0",
            "test_samples_are_the_guided_teachers_from_their_noise_and_captions",
        ),
        (
            "prepare: noise by the place in the file",
            "noise_of(settings.seed, i, shape) for i in rows",
            "noise_of(settings.seed, i, shape) for i in range(len(rows))",
            "test_samples_are_the_guided_teachers_from_their_noise_and_captions",
        ),
        (
            "prepare: captions are not counted round",
            "[distinct[i % len(distinct)] for i in range(size)]",
            "[distinct[min(i, len(distinct) - 1)] for i in range(size)]",
            "test_samples_are_the_guided_teachers_from_their_noise_and_captions",
        ),
        (
            "prepare: a student's adapters change the teacher's name",
            "yield from base_parameters(run.roles.base)",
            "yield from run.roles.base.parameters()",
            "test_a_teachers_fingerprint_is_its_weights_kind_and_schedule",
        ),
        (
            "prepare: the text encoder is not part of the teacher's name",
            'if name.startswith("text_encoder") and isinstance(part, nn.Module):',
            'if name == "nothing" and isinstance(part, nn.Module):',
            "test_a_teachers_fingerprint_is_its_weights_kind_and_schedule",
        ),
        (
            "prepare: the kind of prediction is not part of the teacher's name",
            'f"{denoiser.prediction_type} {denoiser.schedule.family} {levels}"',
            'f"{denoiser.schedule.family} {levels}"',
            "test_a_teachers_fingerprint_is_its_weights_kind_and_schedule",
        ),
        (
            "prepare: what is not finite is kept",
            "if not x0.half().isfinite().all():",
            "if x0.numel() == 0:",
            "test_a_teacher_that_gives_nan_is_one_sentence",
        ),
        (
            "prepare: finished files are made again",
            "missing = files.missing()",
            "missing = list(range(len(files)))",
            "test_prepared_distilled_halfway_and_resumed_is_distilled",
        ),
        (
            "prepare: every stage samples the teacher for itself",
            "if shared is not None and run.recipe.pairs.path is None:",
            "if shared is None and run.recipe.pairs.path is None:",
            "tests/runs/test_distill_hyper.py::test_stages_share_the_samples_of_the_teacher_that_both_want",
        ),
        (
            "prepare: stages share what they do not both want",
            "json.dumps(wanted, sort_keys=True)",
            "json.dumps(sorted(wanted), sort_keys=True)",
            "tests/runs/test_distill_hyper.py::test_stages_share_the_samples_of_the_teacher_that_both_want",
        ),
    ),
    *planted(
        "runs/plan.py",
        "planning/test_doctor.py",
        (
            "plan: the least effective advice comes first",
            "key=lambda change: -change.saves",
            "key=lambda change: change.saves",
            "test_advice_is_ordered_by_what_it_saves",
        ),
    ),
]
