"""Planted defects of exports and published checkpoints."""

from tests.mutants.mutant import planted

_STEPS = "test_what_is_saved_steps_like_us"
_ENTRY = "test_an_entry_samples_as_diffusers_does"
_FOLDER = "test_a_pipeline_folder_draws_right_with_nothing_set"
_HOSTILE = "test_a_hostile_file_is_one_sentence_and_loads_nothing"
_KOHYA = "tests/export/test_publish.py::test_loras_hold_the_students_weights[kohya-float16-0.001]"

EXPORTS = [
    *planted(
        "export/lora.py",
        "export/test_layouts.py",
        ("export: kohya's alpha is one", "torch.tensor(float(_rank(lora, layer))", "torch.tensor(float(1)", _KOHYA),
        (
            "export: kohya's down and up change places",
            '_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}',
            '_PARTS = {"lora_B": "lora_down", "lora_A": "lora_up"}',
            _KOHYA,
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
            "layer.replace('.', '_')",
            "layer.replace('.', '_', 3)",
            "test_comfyui_finds_every_layer[SDXL]",
        ),
    ),
    *planted(
        "export/scheduler.py",
        "export/test_scheduler.py",
        ("export: x0 is clipped", '"clip_sample": False', '"clip_sample": True', f"{_STEPS}[lcm 4-epsilon]"),
        (
            "export: the base's defaults come back",
            'base.items() if not key.startswith("_")}',
            "base.items()}",
            "test_the_bases_own_defaults_do_not_come_back",
        ),
        (
            "export: diffusers' DDIM at three steps",
            "if 1000 % n == 0:  # elsewhere",
            "if True:  # elsewhere",
            f"{_STEPS}[ddim 3-epsilon]",
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
            "export: phases end at clean data",
            '"final_sigmas_type": last',
            '"final_sigmas_type": "zero"',
            f"{_STEPS}[phased 4-epsilon]",
        ),
        (
            "export: FLUX's levels are not shifted",
            '{**common, "shift": shift}',
            '{**common, "shift": 1.0}',
            "test_flux_lays_the_fractions_itself",
        ),
        (
            "export: TCD's eta is left to the pipeline",
            '"set_alpha_to_one": False}, {"eta": eta}\n',
            '"set_alpha_to_one": False}, {}\n',
            f"{_STEPS}[tcd-epsilon]",
        ),
    ),
    *planted(
        "export/pipeline.py",
        "export/test_publish.py",
        ("export: guidance is closed by ones", "nn.init.zeros_(layer.weight)", "nn.init.ones_(layer.weight)", _FOLDER),
        ("export: guidance is not closed", "_config(network, time_cond_proj_dim=_CLOSED)", "pass", _FOLDER),
        (
            "export: the told scale counts from zero",
            "1000 * (card.guidance_embed - 1)",
            "1000 * card.guidance_embed",
            "test_a_told_guidance_scale_is_fixed_in_the_weights",
        ),
        (
            "export: the told scale is left behind",
            "first.bias += first.weight",
            "first.bias += 0 * first.weight",
            "test_a_told_guidance_scale_is_fixed_in_the_weights",
        ),
    ),
    *planted(
        "export/round_trip.py",
        "export/test_publish.py",
        (
            "export: layers that diffusers does not find pass",
            "if found != layers:",
            "if False:",
            "test_an_export_that_draws_otherwise_is_no_export",
        ),
        (
            "export: what draws something else passes",
            "if not gap <= limit:",
            "if False:",
            "test_an_export_that_draws_otherwise_is_no_export",
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
            "    finally:\n        shutil.rmtree(part, ignore_errors=True)",
            "    finally:\n        pass",
            "test_an_export_that_draws_otherwise_is_no_export",
        ),
        (
            "export: a LoRA leaves the told scale behind",
            "    if card.extra_inputs:\n",
            "    if False:\n",
            "test_a_told_guidance_scale_is_fixed_in_the_weights",
        ),
        (
            "export: a LoRA is exported without the student under it",
            "if first_teacher(source) != card.teacher:",
            "if False:",
            "test_a_lora_on_another_student_is_refused",
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
    *planted(
        "students/lineage.py",
        "export/test_publish.py",
        ("export: an exported pipeline is taken for a student's folder", "if is_pipeline(path):", "if False:", _FOLDER),
    ),
]

PUBLISHED = [
    *planted(
        "models/lora_files.py",
        "checkpoints/test_load.py",
        (
            "foreign: layers that are not there are ignored",
            "if found < count:",
            "if False:",
            f"{_HOSTILE}[mixed layouts]",
        ),
        ("foreign: numbers that are none are loaded", "if bad is not None:", "if False:", f"{_HOSTILE}[not a number]"),
        (
            "foreign: the text encoder's part is dropped",
            'if any(name.startswith(("text_encoder", "lora_te")) for name in tensor_names(path)):',
            "if False:",
            f"{_HOSTILE}[text encoder]",
        ),
        (
            "foreign: an absurd alpha is believed",
            "abs(scale) < 1e4",
            "True",
            f"{_HOSTILE}[absurd rank in the header]",
        ),
        (
            "foreign: alpha in the header is forgotten",
            "float(alphas[key]) / t.shape[1]",
            "1.0",
            "test_a_lora_of_any_layout_is_read_as_ours[peft with alpha in its header]",
        ),
        (
            "foreign: kohya's alpha is forgotten",
            ' * float(module.scaling["foreign"])',
            "",
            "test_a_lora_of_any_layout_is_read_as_ours[kohya]",
        ),
    ),
    *planted(
        "checkpoints/load.py",
        "checkpoints/test_load.py",
        (
            "checkpoints: the LoRA scale is forgotten",
            "lora, entry.lora_scale or 1.0)\n    else",
            "lora, 1.0)\n    else",
            "test_a_lora_is_added_at_the_entrys_scale",
        ),
        (
            "checkpoints: the told scale counts from zero",
            "1000 * (guidance_embed - 1)",
            "1000 * guidance_embed",
            "test_a_network_that_is_told_its_guidance_is_told_it",
        ),
        (
            "checkpoints: the base's prediction type stays",
            'entry.scheduler_overrides.get("prediction_type", teacher.denoiser.prediction_type)',
            "teacher.denoiser.prediction_type",
            "test_a_whole_network_replaces_the_bases",
        ),
        (
            "checkpoints: a LoRA of another rank is handed on",
            'if weights == "lora" and has != {rank}:',
            "if False:",
            "test_a_recipe_starts_from_one[lora-8-has rank 4]",
        ),
    ),
    *planted(
        "checkpoints/sampling.py",
        "checkpoints/test_sampling.py",
        (
            "checkpoints: DDIM steps to its next time",
            "replace(at, next=at.time - stride)",
            "at",
            f"{_ENTRY}[hyper-sdxl-12step-cfg]",
        ),
        (
            "checkpoints: sigmas are not shifted",
            "Schedule.flow(shift_of(entry, config)).shifted(flow_sigmas(entry, config, n))",
            "tuple(flow_sigmas(entry, config, n))",
            f"{_ENTRY}[pcm-sd3-4step-shift3]",
        ),
        (
            "checkpoints: Euler starts from unit noise",
            '"table" if entry.scheduler.startswith("Euler") else "unit"',
            '"unit"',
            f"{_ENTRY}[sdxl-turbo]",
        ),
        (
            "checkpoints: DDIM ends at clean data",
            '"clean" if config.get("set_alpha_to_one", True) else "end"',
            '"clean"',
            f"{_ENTRY}[pcm-sdxl-4step-smallcfg]",
        ),
        (
            "checkpoints: FLUX's tokens are too many",
            "_FLUX_TOKENS = 16 * 16",
            "_FLUX_TOKENS = 8 * 8",
            f"{_ENTRY}[hyper-flux-8step]",
        ),
        (
            "checkpoints: the entry's eta is forgotten",
            "(entry.eta or 0.0)",
            "0.0",
            f"{_ENTRY}[hyper-sdxl-unified]",
        ),
        (
            "checkpoints: the entry's timesteps are forgotten",
            "if entry.timesteps is not None and n == len(entry.timesteps):",
            "if False:",
            f"{_ENTRY}[dmd2-sdxl-4step]",
        ),
        (
            "checkpoints: the entry's sigmas are forgotten",
            "own = entry.sigmas\n",
            "own = None\n",
            f"{_ENTRY}[pcm-sd3-4step-shift1]",
        ),
    ),
    *planted(
        "checkpoints/explain.py",
        "checkpoints/test_explain.py",
        (
            "checkpoints: a wrong number of steps is not said",
            "if steps not in entry.steps:",
            "if False:",
            "test_wrong_wishes_are_warned_about",
        ),
        (
            "checkpoints: guidance 0 is warned about",
            "max(1.0, guidance_scale) <= high",
            "guidance_scale <= high",
            "test_wrong_wishes_are_warned_about",
        ),
        (
            "checkpoints: the lines leave SD3's levels to diffusers",
            'entry.sigmas or (entry.flow and entry.family == "sd3")',
            "entry.sigmas",
            "test_the_lines_for_diffusers_do_what_the_entry_says[hyper-sd3-4step-cfg]",
        ),
        (
            "checkpoints: the lines forget the LoRA scale",
            "if entry.lora_scale != 1 else lines",
            "if False else lines",
            "test_the_lines_for_diffusers_do_what_the_entry_says[hyper-sd3-4step-cfg]",
        ),
    ),
]
