"""Planted defects of target times in the weights of exports."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "export/fold.py",
        "export/test_fold.py",
        (
            "fold: the inverse of what is added for that of what is read",
            "torch.linalg.pinv(white, rtol=_ZERO)",
            "torch.linalg.pinv(torch.linalg.solve_triangular(root, e.T, upper=False), rtol=_ZERO)",
            "test_told_and_folded_are_equal_on_the_grid[lora-ranks-False]",
        ),
        (
            "fold: the layer's own adapter does not read the target time",
            "            before = base + own[1] @ own[0]\n",
            "            before = base\n",
            "test_told_and_folded_are_equal_on_the_grid[lora-ranks-False]",
        ),
        (
            "fold: the layer's own adapter is lost",
            "torch.cat([*own[i : i + 1], part], dim=i)",
            "torch.cat([part], dim=i)",
            "test_told_and_folded_are_equal_on_the_grid[lora-ranks-False]",
        ),
        (
            "fold: the learnt guidance scale stays behind",
            "read(t, **given, end=end)",
            "read(t, **own, end=end)",
            "test_the_guidance_scale_is_folded_with_it[False]",
        ),
        (
            "fold: the network's own guidance scale is not there",
            "if extras is None or key not in extras.names}",
            "if False}",
            "test_the_guidance_scale_is_folded_with_it[True]",
        ),
        (
            "fold: the layer is read before the extra inputs are added",
            "layer.register_forward_hook(look)",
            "layer.register_forward_pre_hook(lambda module, args: look(module, args, args[0]))",
            "test_the_layer_may_be_the_whole_embedder[ranks]",
        ),
        (
            "fold: rounded times are no error",
            "covariance = errors.T @ errors / len(errors)",
            "covariance = 0 * errors.T @ errors",
            "test_half_precision_disturbs_it_little",
        ),
        (
            "fold: its error is not checked",
            "        if not gap <= LIMIT:\n",
            "        if False:\n",
            "test_what_cannot_be_folded_is_one_sentence",
        ),
        (
            "fold: one rank for all steps",
            "int((sizes[:rank] >",
            "int((sizes[:1] >",
            "test_told_and_folded_are_equal_on_the_grid[full-whole-False]",
        ),
        (
            "fold: fresh noise passes",
            "if is_folded(card) and (eta := sampler_of(card).fresh_noise):",
            "if (eta := 0):",
            "test_fresh_noise_is_refused_with_the_ways_out",
        ),
    ),
    *planted(
        "sampling/samplers.py",
        "export/test_fold.py",
        (
            "fold: clean data are a target time",
            "[(t, max(end, schedule.end)) for",
            "[(t, end) for",
            "test_the_targets_of_a_sampler_are_those_that_sampling_tells",
        ),
    ),
    *planted(
        "export/pipeline.py",
        "export/test_fold_files.py",
        (
            "fold: the guidance scale is in weight and bias",
            "_W in tensors and fold is None",
            "_W in tensors",
            "test_the_scale_of_guidance_is_in_the_lora_too",
        ),
        (
            "fold: a pipeline has the student's weights without its target times",
            "weight.copy_(fold.folded(weight))",
            "fold.folded(weight)",
            "test_a_pipeline_is_right_for_its_own_steps_and_says_so",
        ),
    ),
    *planted(
        "export/publish.py",
        "export/test_fold_files.py",
        (
            "fold: a file does not say for which steps it is right",
            "target_times=fold.targets if fold is not None else ()",
            "target_times=()",
            "test_a_pipeline_is_right_for_its_own_steps_and_says_so",
        ),
    ),
    *planted(
        "models/families/flux2.py",
        "export/test_layouts.py",
        (
            "comfyui: FLUX.2's time embedding is said to be read from a LoRA",
            "    comfyui_time_lora = False\n",
            "",
            "test_where_comfyui_finds_the_layer_of_the_target_times",
        ),
    ),
    *planted(
        "students/card.py",
        "export/test_fold.py",
        (
            "fold: an export is sampled at times that its weights do not hold",
            ".max(axis=1).min() > width",
            ".max(axis=1).min() > 1e9",
            "test_other_times_than_those_of_the_weights_are_refused",
        ),
    ),
    *planted(
        "students/lineage.py",
        "export/test_fold_files.py",
        (
            "fold: an export that is right at few times becomes a teacher",
            "        _refuse_export(Path(name))\n",
            "",
            "tests/export/test_heads_files.py::test_an_export_is_no_run_and_such_a_one_no_teacher"
            "[diffusers-True-the target times]",
        ),
    ),
]
