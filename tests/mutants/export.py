"""Planted defects of export."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "export/scheduler.py",
        "export/test_scheduler.py",
        (
            "export: x0 is clipped",
            '"clip_sample": False',
            '"clip_sample": True',
            "test_what_is_saved_steps_like_us[lcm 4-epsilon]",
        ),
        (
            "export: the base's defaults come back",
            'base.items() if not key.startswith("_")}',
            "base.items()}",
            "test_the_bases_own_defaults_do_not_come_back",
        ),
        (
            "export: flow's lowest level is taken for zero",
            "(n - 1) / (1 - lowest)",
            "(n - 1)",
            "test_flow_levels_are_the_shifted_fractions[3.0-4]",
        ),
        (
            "export: flow's last level is not shifted",
            "terminal = shift / n / (1 + (shift - 1) / n)",
            "terminal = 1 / n",
            "test_flow_levels_are_the_shifted_fractions[3.0-4]",
        ),
        (
            "export: FLUX's levels are not shifted",
            '{**common, "shift": shift}',
            '{**common, "shift": 1.0}',
            "test_flux_lays_the_fractions_itself",
        ),
    ),
    *planted(
        "export/lora.py",
        "export/test_layouts.py",
        (
            "export: kohya's alpha is one",
            "torch.tensor(float(_rank(lora, layer))",
            "torch.tensor(float(1)",
            "tests/export/test_publish.py::test_loras_hold_the_students_weights[kohya-float16-0.001]",
        ),
        (
            "export: kohya's down and up change places",
            '_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}',
            '_PARTS = {"lora_B": "lora_down", "lora_A": "lora_up"}',
            "tests/export/test_publish.py::test_loras_hold_the_students_weights[kohya-float16-0.001]",
        ),
        (
            "export: the header's alpha is peft's default",
            '"lora_alpha": usual,',
            '"lora_alpha": 8,',
            "test_the_header_says_rank_as_alpha",
        ),
        (
            "export: two layers share a kohya name",
            'if f"{key}.alpha" in found:',
            "if False:",
            "test_kohya_names_that_fall_together_are_refused",
        ),
        (
            "export: kohya names keep their dots",
            "layer.removeprefix(part).replace('.', '_')",
            "layer.removeprefix(part).replace('.', '_', 2)",
            "test_comfyui_finds_every_layer[SDXL]",
        ),
    ),
    *planted(
        "export/pipeline.py",
        "export/test_publish.py",
        (
            "export: guidance is closed by ones",
            "nn.init.zeros_(layer.weight)",
            "nn.init.ones_(layer.weight)",
            "test_a_pipeline_folder_samples_right_with_nothing_set",
        ),
        (
            "export: guidance is not closed",
            "_config(network, time_cond_proj_dim=_CLOSED)",
            "pass",
            "test_a_pipeline_folder_samples_right_with_nothing_set",
        ),
        (
            "export: the embedded scale counts from zero",
            "1000 * (card.guidance_embed - 1)",
            "1000 * card.guidance_embed",
            "test_an_embedded_guidance_scale_is_fixed_in_the_weights",
        ),
        (
            "export: the embedded scale is left behind",
            "first.bias += first.weight",
            "first.bias += 0 * first.weight",
            "test_an_embedded_guidance_scale_is_fixed_in_the_weights",
        ),
    ),
    *planted(
        "export/round_trip.py",
        "export/test_publish.py",
        (
            "export: layers that diffusers does not find pass",
            "if found != layers:",
            "if False:",
            "test_an_export_whose_samples_differ_is_no_export",
        ),
        (
            "export: samples that differ pass",
            "if not gap <= limit:",
            "if False:",
            "test_an_export_whose_samples_differ_is_no_export",
        ),
        (
            "export: schedulers of flow models draw from elsewhere",
            'torch.manual_seed(request["seed"])',
            'torch.Generator().manual_seed(request["seed"])',
            "tests/export/test_families.py::test_lcm_on_a_flow_model",
        ),
    ),
    *planted(
        "export/publish.py",
        "export/test_publish.py",
        (
            "export: files are their owner's alone",
            "        give_usual_permissions(path)\n",
            "        path.chmod(0o600)\n",
            "test_what_stands_in_the_folder",
        ),
        (
            "export: a failed one leaves its folder behind",
            ("    finally:\n        shutil.rmtree(part, ignore_errors=True)"),
            ("    finally:\n        pass"),
            "test_an_export_whose_samples_differ_is_no_export",
        ),
        (
            "export: a LoRA leaves the embedded scale behind",
            "    if card.extra_inputs:\n",
            "    if False:\n",
            "test_an_embedded_guidance_scale_is_fixed_in_the_weights",
        ),
        (
            "export: a LoRA is exported without the student under it",
            "if first_teacher(source) != card.teacher:",
            "if False:",
            "test_a_lora_on_another_student_is_refused",
        ),
        (
            "export: the teacher's prediction kind for an x0 student",
            "card.prediction_type or teacher.denoiser.prediction_type, first_teacher",
            "teacher.denoiser.prediction_type, first_teacher",
            "tests/export/test_families.py::test_a_student_of_every_family_is_read_back_elsewhere[sd15-diffusers]",
        ),
    ),
    *planted(
        "export/header.py",
        "export/test_layouts.py",
        (
            "export: the hash takes a part of the header in",
            "file.seek(8 + int.from_bytes",
            "file.seek(int.from_bytes",
            "test_the_hash_is_that_of_the_tensors_bytes",
        ),
    ),
]
