"""Planted defects of what a family may say of its own: lengths of texts, autoencoders, guidance, taps, grids."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "models/cond.py",
        "models/test_text_lengths.py",
        (
            "texts: lengths go to the device",
            "            if on_host(name):\n                return t\n",
            "",
            "test_lengths_stay_on_the_host",
        ),
        (
            "texts: the null is made as long as the prompt",
            "n.expand(len(t), *n.shape[1:]) if k in texts else n.expand_as(t)",
            "n.expand_as(t)",
            "test_the_null_keeps_its_own_length",
        ),
        (
            "texts: zeros stand before a shorter text",
            "torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])]",
            "torch.cat([t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:]), t]",
            "test_batches_are_joined_with_zeros_behind_the_shorter_texts",
        ),
    ),
    *planted(
        "data/rows.py",
        "data/test_rows_of_texts.py",
        (
            "texts: a batch is padded to the longest text of all",
            "self._padded_to(self._longest(picked, numbers))",
            "{}",
            "test_only_real_tokens_are_in_the_files_and_a_batch_is_as_long_as_its_longest",
        ),
    ),
    *planted(
        "data/sources.py",
        "data/test_rows_of_texts.py",
        (
            "texts: a batch's lengths wait on the device",
            "t if on_host(name) else t.to(rng.device, non_blocking=True)",
            "t.to(rng.device, non_blocking=True)",
            "test_a_batch_has_its_lengths_on_the_host",
        ),
    ),
    *planted(
        "data/pairs.py",
        "data/test_rows_of_texts.py",
        (
            "texts: a teacher's samples are padded file by file",
            "cut_padding(kept) if LENGTH in kept else kept",
            "kept",
            "test_samples_of_a_teacher_are_kept_likewise",
        ),
        (
            "texts: large values of a prompt become infinite",
            "(of_condition and t.dtype == torch.bfloat16)",
            "False",
            "test_samples_of_a_teacher_are_kept_likewise",
        ),
    ),
    *planted(
        "diffusion/schedule.py",
        "diffusion/test_step_shift.py",
        (
            "schedule: four steps have the shift of fifty",
            "self.stretched(self.shifted(np.arange(n, 0, -1) / n, n))",
            "self.stretched(self.shifted(np.arange(n, 0, -1) / n))",
            "test_every_grid_has_the_shift_of_its_own_number_of_steps",
        ),
        (
            "schedule: a stretched grid does not reach its lowest level",
            "(1 - self.terminal) / (1 - grid[-1])",
            "(1 - self.terminal)",
            "test_a_stretched_grid_is_that_of_diffusers",
        ),
    ),
    *planted(
        "export/scheduler.py",
        "diffusion/test_step_shift.py",
        (
            "export: a stretched grid is exported unstretched",
            '{"shift_terminal": schedule.terminal} if',
            "{} if",
            "test_an_exported_scheduler_makes_the_students_levels",
        ),
        (
            "export: the shift of fifty steps goes into a scheduler of four",
            "schedule.shift_at(n), {",
            "schedule.shift, {",
            "test_an_exported_scheduler_makes_the_students_levels",
        ),
    ),
    *planted(
        "methods/lightning.py",
        "diffusion/test_step_shift.py",
        (
            "lightning: stages do not share the times of a stretched grid",
            "    if schedule.terminal:\n",
            "    if False:\n",
            "test_the_stages_of_lightning_share_the_students_times",
        ),
    ),
    *planted(
        "models/roles.py",
        "models/test_family_hooks.py",
        (
            "roles: a network's own rule of guidance is lost",
            "guidance_of(self.network)(with_, without, scale)",
            "without + scale * (with_ - without)",
            "test_a_network_may_guide_by_a_rule_of_its_own",
        ),
    ),
    *planted(
        "models/families/network.py",
        "models/test_family_hooks.py",
        (
            "features: text tokens are taken for the image's",
            "self.image_tokens(found[tap], height * width)",
            "found[tap]",
            "test_features_are_the_images_tokens_of_one_sequence_and_the_forward_ends_where_the_family_says",
        ),
    ),
    *planted(
        "models/families/family.py",
        "models/test_family_hooks.py",
        (
            "families: a scheduler's own stretch is taken for the model's",
            "if self.passes_sigmas else 0.0",
            "",
            "test_a_family_sets_the_shift_where_the_scheduler_leaves_it_open",
        ),
    ),
    *planted(
        "models/quantize.py",
        "models/test_family_hooks.py",
        (
            "quantise: layers outside the blocks too",
            "isinstance(layer, nn.Linear) and path.startswith(lists)",
            "isinstance(layer, nn.Linear)",
            "test_what_is_quantised_are_the_linear_layers_in_lists_of_modules",
        ),
    ),
    *planted(
        "models/families/folder.py",
        "models/test_family_hooks.py",
        (
            "folder: a list of numbers in the index is a part",
            "all(x is None or isinstance(x, str) for x in value)",
            "True",
            "test_lists_of_numbers_in_an_index_are_settings_and_no_parts",
        ),
    ),
]
