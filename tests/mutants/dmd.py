"""Planted defects of DMD, of the pairs it learns from, and of how a teacher is sampled for them."""

from tests.mutants.mutant import planted

STEP = "test_both_players_steps_are_the_papers[vp-epsilon-guided-full]"
FEATURES = "test_both_players_steps_are_the_papers[vp-epsilon-features-full]"
EARLIER = "test_both_players_steps_are_the_papers[vp-epsilon-asked earlier-full]"

DMD = [
    *planted(
        "methods/dmd.py",
        "methods/test_dmd.py",
        (
            "dmd: the answers to the pairs' noise are matched, those to fresh noise regressed",
            "return Shared(x[: len(draws.start)], x[len(draws.start) :])",
            "return Shared(x[len(draws.start) :], x[: len(draws.start)])",
            STEP,
        ),
        (
            "dmd: the student starts the pairs from fresh noise",
            "torch.cat([draws.start, pairs.noise])",
            "torch.cat([draws.start, draws.start])",
            STEP,
        ),
        (
            "dmd: pairs are given the captions of the data",
            "cond = Cond.cat([cond, pairs.cond])",
            "cond = Cond.cat([cond, cond])",
            STEP,
        ),
        (
            "dmd: the student is asked one step below pure noise",
            "float(schedule.start if given is None else given)",
            "float(schedule.start - 1 if given is None else given)",
            STEP,
        ),
        (
            "dmd: another time of the student is not heard",
            "float(schedule.start if given is None else given)",
            "float(schedule.start)",
            EARLIER,
        ),
        (
            "dmd: regression is towards the data",
            "wanted = _pairs(batch).x0",
            "wanted = batch.x0",
            STEP,
        ),
        (
            "dmd: regression of the fresh answers",
            "self._regression(roles, shared.reference, wanted)",
            "self._regression(roles, x, wanted)",
            STEP,
        ),
        (
            "dmd: features of the latents, not of the pictures",
            "roles.encoder.features(roles.decode(reference), taps)",
            "roles.encoder.features(reference, taps)",
            FEATURES,
        ),
        (
            "dmd: the regression's weight is left out",
            "matching + settings.regression_weight * regression",
            "matching + regression",
            STEP,
        ),
        (
            "dmd: the regression carries no gradient",
            "matching + settings.regression_weight * regression",
            "matching + settings.regression_weight * regression.detach()",
            STEP,
        ),
        (
            "dmd: the student goes against the scores",
            "matching = matching_loss(x, found.gradient)",
            "matching = matching_loss(x, -found.gradient)",
            STEP,
        ),
        (
            "dmd: both scores are compared at the fake score's time",
            "self.scores.matching(roles, x, draws.noise, draws.time, batch.cond)",
            "self.scores.matching(roles, x, draws.noise, draws.fake_time, batch.cond)",
            STEP,
        ),
        (
            "dmd: the fake score learns from the noise it is compared at",
            "draws.fake_noise, draws.fake_time, batch.cond))",
            "draws.noise, draws.fake_time, batch.cond))",
            STEP,
        ),
        (
            "dmd: the fake score learns from the pairs' answers",
            "denoising_loss(roles, shared.answer,",
            "denoising_loss(roles, shared.reference,",
            STEP,
        ),
        (
            "dmd: the teacher is not guided",
            "ScorePair(schedule, self.settings.guidance_scale, self.settings.weighting)",
            "ScorePair(schedule, 1.0, self.settings.weighting)",
            STEP,
        ),
        (
            "dmd: the scores are compared at all levels",
            'self.scores.draw_time(rng, "time", 0.02, 0.98)',
            'self.scores.draw_time(rng, "time")',
            "test_draws_are_uniform_over_the_levels_that_the_paper_names",
        ),
        (
            "dmd: the fake score never sees the ends of the schedule",
            'self.scores.draw_time(rng, "fake_time")',
            'self.scores.draw_time(rng, "fake_time", 0.02, 0.98)',
            "test_draws_are_uniform_over_the_levels_that_the_paper_names",
        ),
        (
            "dmd: one time for both players",
            'self.scores.draw_time(rng, "fake_time")',
            'self.scores.draw_time(rng, "time")',
            "test_draws_are_uniform_over_the_levels_that_the_paper_names",
        ),
        (
            "dmd: its students are sampled at pure noise whatever they were asked at",
            "times = () if settings.timestep is None else (settings.timestep,)",
            "times: tuple[float, ...] = ()",
            "test_its_students_are_asked_once_where_they_were_trained",
        ),
    ),
    *planted(
        "methods/parts/distances.py",
        "methods/test_dmd.py",
        (
            "dmd: features are compared with their lengths",
            "F.normalize(working(x), dim=1) - F.normalize(working(y), dim=1)",
            "working(x) - working(y)",
            FEATURES,
        ),
        (
            "dmd: features are normalised over the positions too",
            "F.normalize(working(x), dim=1) - F.normalize(working(y), dim=1)",
            "F.normalize(working(x), dim=-1) - F.normalize(working(y), dim=-1)",
            FEATURES,
        ),
    ),
    *planted(
        "verification/dmd.py",
        "verification/test_verify_dmd.py",
        (
            "verify dmd: guidance weighs the unconditional score with w, not 1 - w",
            "(1 - scale) * precision(without[1])",
            "scale * precision(without[1])",
            "test_guidance_moves_mean_and_variance_as_the_closed_form_says",
        ),
        (
            "verify dmd: fresh data are held against data, the student is not looked at",
            "0.0, sliced_w2(drawn, data), limit",
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
            "_solver_rows(bench, method) if bench.guidance_scale == 1.0 else []",
            "[]",
            "test_the_solver_is_a_fixed_point_of_both_terms",
        ),
    ),
]

PAIRS = [
    *planted(
        "data/pairs.py",
        "data/test_pairs.py",
        (
            "pairs: noise is drawn row after row from one stream",
            'stream_key(seed, "pair", row)',
            'stream_key(seed, "pair")',
            "test_noise_is_each_rows_own_and_the_same_for_ever",
        ),
        (
            "pairs: noise does not depend on the seed",
            'stream_key(seed, "pair", row)',
            'stream_key("pair", row)',
            "test_noise_is_each_rows_own_and_the_same_for_ever",
        ),
        (
            "pairs: noise by the place in the batch",
            "noise_of(self.seed, int(i), self.mean.shape[1:]) for i in picked",
            "noise_of(self.seed, i, self.mean.shape[1:]) for i in range(len(picked))",
            "test_rows_of_a_batch_belong_together",
        ),
        (
            "pairs: the order of pairs is that of the data",
            'Order(len(x0), "pairs")',
            "Order(len(x0))",
            "test_pairs_go_round_in_an_order_of_their_own_that_depends_on_the_step_alone",
        ),
        (
            "pairs: conditions stay where they are",
            "cond = None if self.cond is None else self.cond[rows].to(rng.device)\n        return Pairs",
            "cond = None if self.cond is None else self.cond[: len(rows)].to(rng.device)\n        return Pairs",
            "test_rows_of_a_batch_belong_together",
        ),
        (
            "pairs: the last file is as long as the others",
            "range(number * self.per_file, min((number + 1) * self.per_file, self.size))",
            "range(number * self.per_file, (number + 1) * self.per_file)",
            "test_what_is_written_is_read_with_its_conditions_its_nulls_and_its_cost",
        ),
        (
            "pairs: a last file that is not full is not made",
            "return -(-self.size // self.per_file)",
            "return self.size // self.per_file",
            "test_what_is_written_is_read_with_its_conditions_its_nulls_and_its_cost",
        ),
        (
            "pairs: files of other samples pass for these",
            'if said.get("about") != json.dumps(self.about, sort_keys=True):',
            "if not said:",
            "test_samples_of_anything_else_are_refused[changes1-samples of pairs.size = 10, not 11]",
        ),
        (
            "pairs: other samples' folders are taken over",
            "if stored.get(key) != self.about.get(key):",
            "if stored.get(key) != self.about.get(key) and key == 'size':",
            "test_samples_of_anything_else_are_refused[changes3-samples of another teacher: delete]",
        ),
        (
            "pairs: files that nothing is known of are taken over",
            'if any(self.place.glob("*.safetensors")):',
            "if False:",
            "test_a_folder_of_something_else_is_refused",
        ),
        (
            "pairs: the cost is that of the first file",
            "sum(cost for _, cost in found)",
            "found[0][1]",
            "test_what_is_written_is_read_with_its_conditions_its_nulls_and_its_cost",
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
            "yield from base_parameters(job.roles.base)",
            "yield from job.roles.base.parameters()",
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
    ),
    *planted(
        "runs/distill.py",
        "runs/test_teacher_samples.py",
        (
            "distill: pairs cost nothing",
            "job.sampled = 0.0 if pairs is None else pairs.cost",
            "job.sampled = 0.0",
            "test_a_run_that_needs_pairs_makes_them_first_and_counts_them",
        ),
        (
            "distill: the folder is claimed before its pairs are looked at",
            'files, mine = pair_files(job, shared), job.folder / "recipe.yaml"\n',
            'mine = job.folder / "recipe.yaml"\n    replace_text(mine, as_yaml(job.recipe))\n'
            "    files = pair_files(job, shared)\n",
            "test_stale_samples_are_refused_and_the_folder_is_left_alone",
        ),
        (
            "distill: the teacher's samples as data are pictures after all",
            'of_teacher = pairs is not None and recipe.data.source == "teacher"',
            "of_teacher = False",
            "test_any_method_trains_on_the_teachers_samples",
        ),
    ),
    *planted(
        "planning/estimate.py",
        "planning/test_estimate.py",
        (
            "estimate: pairs take no memory",
            "return WithPairs(read, made), [data, made]",
            "return WithPairs(read, made), [data]",
            "test_pairs_are_counted_where_a_method_learns_from_them",
        ),
    ),
    *planted(
        "recipe/schema.py",
        "runs/test_teacher_samples.py",
        (
            "recipe: pairs are guided as the sample grid, not as the method",
            "scale = float(own) if isinstance(own, int | float) else recipe.sample.guidance_scale",
            "scale = recipe.sample.guidance_scale",
            "test_what_a_recipe_leaves_out",
        ),
    ),
]
