"""Planted defects of settings and costs that are stated but do not arrive, in whatever room they stand."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "runs/dataset.py",
        "runs/test_caption_dropout.py",
        (
            "settings: captions are never dropped",
            "    if recipe.data.caption_dropout:\n",
            "    if recipe.data.caption_dropout > 1:\n",
            "test_captions_are_dropped_at_their_share[0.4]",
        ),
        (
            "settings: captions are dropped at the usual share, whatever the recipe says",
            "CaptionDropout(source, recipe.data.caption_dropout)",
            "CaptionDropout(source, 0.1)",
            "test_captions_are_dropped_at_their_share[0.4]",
        ),
    ),
    *planted(
        "data/cache.py",
        "data/test_cache.py",
        (
            "cache: encoded images and captions do not know their teacher",
            '"teacher": self.teacher.origin,',
            '"teacher": "",',
            "test_data_of_another_teacher_are_encoded_again[images]",
        ),
        (
            "cache: a student of the same model encodes all data again",
            '"teacher": self.teacher.origin,',
            '"teacher": self.teacher.name,',
            "test_data_of_another_teacher_are_encoded_again[prompts]",
        ),
    ),
    *planted(
        "checkpoints/sampling.py",
        "inference/test_zero.py",
        (
            "settings: a published file's eta replaces the user's 0",
            "eta if eta is not None else (entry.eta or 0.0)",
            "eta or entry.eta or 0.0",
            "test_eta_of_a_student_and_of_a_published_file[0.0]",
        ),
    ),
    *planted(
        "students/card.py",
        "inference/test_zero.py",
        (
            "settings: a card's eta replaces the user's 0",
            "for key, value in options.items() if value is not None}",
            "for key, value in options.items() if value}",
            "test_images_without_fresh_noise_are_others_than_the_default",
        ),
    ),
    *planted(
        "recipe/load.py",
        "inference/test_zero.py",
        (
            "settings: the method's eta replaces a recipe's 0",
            '{"num_inference_steps", "eta"} - given.model_fields_set',
            '{"num_inference_steps", "eta"} - {key for key in given.model_fields_set if getattr(given, key)}',
            "test_eta_of_a_recipe_is_that_of_its_student[given1-0.0]",
        ),
    ),
    *planted(
        "inference/model.py",
        "inference/test_zero.py",
        (
            "settings: a card's embedded scale replaces the user's 0",
            'self.card.guidance_embed if embed is None else guidance(embed, "guidance_embed")',
            'guidance(embed, "guidance_embed") if embed else self.card.guidance_embed',
            "test_an_embedded_guidance_scale_of_zero_is_not_the_default",
        ),
    ),
    *planted(
        "methods/hyper.py",
        "inference/test_zero.py",
        (
            "settings: hyper of one segment is sampled without fresh noise",
            "eta=0.3 if whole else 0.0",
            "eta=0.0",
            "test_hyper_of_one_segment_is_sampled_as_tcd[1-0.3-tcd]",
        ),
    ),
    *planted(
        "methods/dmd2.py",
        "methods/test_images_needed.py",
        (
            "settings: dmd2 on noised data is said to need none",
            'settings.adversarial_weight > 0 or settings.student_input == "noised"',
            "settings.adversarial_weight > 0",
            "test_a_method_that_needs_no_images_learns_without_them[dmd2 on noised data]",
        ),
        (
            "settings: dmd2 is said to need images for its own samples",
            'settings.adversarial_weight > 0 or settings.student_input == "noised"',
            "True",
            "test_a_method_that_needs_no_images_learns_without_them[dmd2 on its own samples]",
        ),
    ),
    *planted(
        "methods/feedback.py",
        "methods/test_images_needed.py",
        (
            "settings: feedback is said to need no images for its perceptual distance",
            "return settings.perceptual_weight > 0\n",
            "return False\n",
            "test_a_method_that_needs_no_images_learns_without_them"
            "[feedback-perceptual_weight-anchor_weight-held_out-first_exit]",
        ),
    ),
    *planted(
        "training/trainer.py",
        "training/test_step.py",
        (
            "trainer: the logged rate is that of the next step",
            'record["learning_rate"] = self._student.rate(self.done - 1)',
            'record["learning_rate"] = self._student.rate(self.done)',
            "test_a_logged_rate_is_that_of_the_step_it_stands_beside",
        ),
        (
            "trainer: the critic's logged rate is that of the next step",
            "player.rate(self.done - 1)",
            "player.rate(self.done)",
            "test_a_logged_rate_is_that_of_the_step_it_stands_beside",
        ),
    ),
    *planted(
        "recipe/schema.py",
        "planning/test_costs.py",
        (
            "plan: the teacher's samples by Heun cost as those by DDIM",
            'self.num_inference_steps * (2 if self.solver == "heun" else 1)',
            "self.num_inference_steps",
            "test_the_teachers_samples_cost_what_their_solver_asks[heun-9-3.0-2]",
        ),
        (
            "plan: guidance of the teacher's samples is free",
            "calls * (1 if self.guidance_scale == 1.0 else 2)",
            "calls",
            "test_the_teachers_samples_cost_what_their_solver_asks[ddim-5-3.0-2]",
        ),
    ),
    *planted(
        "planning/estimate.py",
        "planning/test_costs.py",
        (
            "plan: text encoders take no memory",
            'held["optimiser"] + texts + waiting + encoding',
            'held["optimiser"] + waiting + encoding',
            "test_every_part_of_a_pipeline_takes_memory_while_images_are_encoded",
        ),
        (
            "plan: text encoders stay during training",
            '"autoencoder": (0 if vae_waits else vae) + others',
            '"autoencoder": (0 if vae_waits else vae) + others + texts',
            "test_every_part_of_a_pipeline_takes_memory_while_images_are_encoded",
        ),
    ),
    *planted(
        "sampling/samplers.py",
        "export/test_ends.py",
        (
            "export: DDIM with all of the noise ends clean, wherever it should end",
            "return ancestral_noise() if self.eta == 1 and times[-1] < 0 else ddim_schedulers",
            "return ancestral_noise() if self.eta == 1 else ddim_schedulers",
            "test_ddim_ends_there_with_any_noise[1.0-end-4]",
        ),
        (
            "export: ancestral Euler ends clean, wherever it should end",
            "return ancestral_noise() if self.eta == 1 and times[-1] < 0 else iter(())",
            "return ancestral_noise() if self.eta == 1 else iter(())",
            "test_ancestral_noise_that_ends_at_the_tables_end_has_no_scheduler",
        ),
    ),
    *planted(
        "sampling/diffusers_schedulers.py",
        "export/test_ends.py",
        (
            "export: DDIM with fresh noise ends at the table's end, wherever it should end",
            '"set_alpha_to_one": bool(times[-1] < 0)}, call',
            '"set_alpha_to_one": False}, call',
            "test_ddim_ends_there_with_any_noise[0.4-clean-4]",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: the teacher's size is the model's own, whatever the recipe says",
            "size=config.size",
            "size=None",
            "test_a_key_changes_a_run[teacher.size]",
        ),
        (
            "settings: large images are never encoded in tiles",
            "vae_tiling=config.vae_tiling",
            "vae_tiling=False",
            "test_a_key_changes_a_run[teacher.vae_tiling]",
        ),
        (
            "settings: the teacher's weights are float32, whatever the recipe says",
            "dtype=DTYPES[config.dtype]",
            'dtype=DTYPES["fp32"]',
            "test_a_key_changes_a_run[teacher.dtype]",
        ),
    ),
    *planted(
        "recipe/schema.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: a LoRA's alpha is its rank, whatever the recipe says",
            "Weights(self.weights, self.rank, self.alpha, self.targets)",
            "Weights(self.weights, self.rank, None, self.targets)",
            "test_a_key_changes_a_run[student.alpha]",
        ),
        (
            "settings: a LoRA adapts the family's layers, whatever the recipe says",
            "Weights(self.weights, self.rank, self.alpha, self.targets)",
            "Weights(self.weights, self.rank, self.alpha, None)",
            "test_a_key_changes_a_run[student.targets]",
        ),
    ),
    *planted(
        "runs/distill.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: a run trains with seed 0, whatever the recipe says",
            "seed=recipe.seed, run_dir",
            "seed=0, run_dir",
            "test_a_key_changes_a_run[seed]",
        ),
        (
            "settings: sample grids are written after the last step alone",
            "(recipe.sample.every, SampleGrid(run))",
            "(recipe.training.steps, SampleGrid(run))",
            "test_a_key_changes_a_run[sample.every]",
        ),
    ),
    *planted(
        "runs/teacher_samples.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: the teacher is sampled from the noises of seed 0",
            "noise_of(settings.seed, i, shape)",
            "noise_of(0, i, shape)",
            "test_a_key_changes_a_run[pairs.seed]",
        ),
        (
            "settings: the teacher is sampled by DDIM, whatever the recipe says",
            "SOLVERS[settings.solver](",
            'SOLVERS["ddim"](',
            "test_a_key_changes_a_run[pairs.solver]",
        ),
    ),
    *planted(
        "runs/dataset.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: scenes are those of seed 1",
            "data.size or 0, data.seed, advance",
            "data.size or 0, 1, advance",
            "test_a_key_changes_a_run[data.seed]",
        ),
        (
            "settings: images are cropped to squares, whatever the recipe says",
            "advance, data.aspect_buckets",
            "advance, False",
            "test_a_key_changes_a_run[data.aspect_buckets]",
        ),
    ),
    *planted(
        "runs/measured_on.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: validation takes 128 prompts, whatever the recipe says",
            "count = recipe.evaluate.count if count is None else count\n    if measures",
            "count = 128 if count is None else count\n    if measures",
            "test_a_key_changes_a_run[evaluate.count]",
        ),
    ),
    *planted(
        "training/optimizers.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: AdamW keeps its own eps",
            '"eps": settings.eps',
            '"eps": 1e-8',
            "test_a_setting_of_training_changes_a_run[eps]",
        ),
    ),
    *planted(
        "training/trainer.py",
        "runs/test_recipe_arrives.py",
        (
            "settings: two checkpoints are kept, whatever the recipe says",
            "self.settings.keep_checkpoints",
            "2",
            "test_a_setting_of_training_changes_a_run[keep_checkpoints]",
        ),
    ),
    *planted(
        "methods/feedback.py",
        "methods/test_settings_arrive.py",
        (
            "settings: feedback samples on a grid of 50 steps, whatever it is told",
            '"original_inference_steps": settings.num_grid_steps',
            '"original_inference_steps": 50',
            "test_a_setting_changes_a_step[feedback.num_grid_steps]",
        ),
    ),
    *planted(
        "methods/lcm.py",
        "methods/test_settings_arrive.py",
        (
            "settings: lcm's Huber loss has the default's width",
            "self.settings.loss, self.settings.huber_c",
            "self.settings.loss",
            "test_a_setting_changes_a_step[lcm.huber_c]",
        ),
    ),
    *planted(
        "methods/lightning.py",
        "methods/test_settings_arrive.py",
        (
            "settings: lightning noises all jumps alike often",
            "settings.renoise_times, settings.renoise_weights",
            "settings.renoise_times, (1.0,) * len(settings.renoise_times)",
            "test_a_setting_changes_a_step[lightning.renoise_weights]",
        ),
    ),
    *planted(
        "cli/use.py",
        "program/test_options_arrive.py",
        (
            "options: sample draws from seed 0, whatever it is told",
            '{"num_inference_steps": steps, "timesteps": times, "eta": eta}, guidance_scale, seed, out,',
            '{"num_inference_steps": steps, "timesteps": times, "eta": eta}, guidance_scale, 0, out,',
            "test_an_option_reaches_the_work[sample.seed]",
        ),
        (
            "options: export computes on the CPU, whatever it is told",
            "made = write(run, to, out, dtype, device)",
            'made = write(run, to, out, dtype, "cpu")',
            "test_an_option_reaches_the_work[export.device]",
        ),
    ),
    *planted(
        "cli/measure.py",
        "program/test_options_arrive.py",
        (
            "options: a benchmark never stops by itself, whatever it is told",
            'out, runs or out / "runs", minutes, show_progress',
            'out, runs or out / "runs", None, show_progress',
            "test_an_option_reaches_the_work[benchmark.minutes]",
        ),
        (
            "options: a report compares by the detector, whatever it is told",
            "make(runs, out, count, not quiet, features, prompts, device)",
            "make(runs, out, count, not quiet, '', prompts, device)",
            "test_an_option_reaches_the_work[report.features]",
        ),
        (
            "options: verify trains by seed 0, whatever it is told",
            "check(name, mixture, seed=seed, steps=steps",
            "check(name, mixture, seed=0, steps=steps",
            "test_an_option_reaches_the_work[verify.seed]",
        ),
    ),
    *planted(
        "scenes64/commands.py",
        "program/test_options_arrive.py",
        (
            "options: a teacher is trained anew, whatever its first weights should be",
            "vae_minutes, unet_minutes, init, export, device, show=True)",
            "vae_minutes, unet_minutes, None, export, device, show=True)",
            "test_an_option_reaches_the_work[teacher train.init]",
        ),
    ),
    *planted(
        "methods/ladd.py",
        "methods/test_sampling_defaults.py",
        (
            "settings: ladd's students are sampled without fresh noise",
            "eta=1.0",
            "eta=0.0",
            "test_students_are_sampled_as_their_papers_say[ladd]",
        ),
    ),
    *planted(
        "methods/lightning.py",
        "methods/test_sampling_defaults.py",
        (
            "settings: lightning's students are said to take any number of steps",
            "no_other_steps=True",
            "no_other_steps=False",
            "test_students_are_sampled_as_their_papers_say[lightning]",
        ),
    ),
    *planted(
        "models/families/flux.py",
        "models/test_family_facts.py",
        (
            "settings: FLUX's pipeline is said to leave its levels to the scheduler",
            "passes_sigmas = True",
            "passes_sigmas = False",
            "test_whether_its_pipeline_hands_over_levels_of_its_own[flux]",
        ),
    ),
    *planted(
        "models/families/pixart.py",
        "models/test_family_facts.py",
        (
            "settings: PixArt's betas in ComfyUI are Stable Diffusion's",
            '("linear", 0.0001, 0.02)',
            '("linear", 0.00085, 0.012)',
            "test_what_other_programs_know_of_it[pixart]",
        ),
    ),
]
