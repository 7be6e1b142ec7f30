"""Planted defects of FLUX.2-klein and FLUX.2-dev."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "models/families/flux2.py",
        "models/test_pipeline_images.py",
        (
            "klein: the shift of 50 steps is that of all",
            "mu = many if count > 4300 else many + (many - few) / 190 * (num_steps - 200)",
            "mu = many + (many - few) / 190 * (50 - 200)",
            "test_an_image_is_the_pipelines_own[klein]",
        ),
        (
            "klein: large images have the shift of few steps too",
            "many if count > 4300 else many +",
            "many +",
            "tests/models/test_flux2.py::test_the_shift_is_that_of_the_pipelines_at_any_size_and_number_of_steps",
        ),
        (
            "klein: latents are not whitened",
            "return (variance + vae.config.batch_norm_eps).rsqrt(), mean",
            "return 1.0, 0.0",
            "test_an_image_is_the_pipelines_own[klein]",
        ),
        (
            "klein: the variance is taken for the deviation",
            "(variance + vae.config.batch_norm_eps).rsqrt(), mean",
            "1 / (variance + vae.config.batch_norm_eps), mean",
            "test_an_image_is_the_pipelines_own[klein]",
        ),
        (
            "klein: rows and columns change places",
            "_counts(1, height, width, 1, device=x.device)",
            "_counts(1, 1, height, width, device=x.device)",
            "test_an_image_is_the_pipelines_own[klein]",
        ),
        (
            "klein: all tokens of a text stand in one place",
            "torch.cartesian_prod(*_counts(1, 1, 1, embeds.shape[1], device=x.device))",
            "torch.zeros(embeds.shape[1], 4, device=x.device)",
            "test_an_image_is_the_pipelines_own[klein]",
        ),
        (
            "klein: data have noise of the autoencoder's",
            "return mean, torch.zeros_like(std)",
            "return mean, std",
            "tests/models/test_flux2.py::test_images_are_encoded_as_in_the_pipeline",
        ),
        (
            "klein: a LoRA has layers that ComfyUI does not find",
            '"norm_out.linear", "proj_out",',
            '"linear", "proj_out",',
            "tests/export/test_layouts.py::test_comfyui_finds_every_layer[klein]",
        ),
        (
            "klein: a few-step model is sampled like its teacher",
            'return _FEW_STEPS if self.settings.get("is_distilled") else None',
            "return None",
            "tests/models/test_flux2.py::test_a_distilled_klein_is_sampled_in_four_steps_without_guidance",
        ),
    ),
    *planted(
        "models/families/folder.py",
        "models/test_flux2.py",
        (
            "klein: gigabytes are read before torchvision is missed",
            "    _check_torchvision(folder, listed)\n",
            "",
            "test_dev_says_in_one_sentence_that_it_needs_torchvision[False]",
        ),
    ),
    *planted(
        "models/families/family.py",
        "models/test_flux2.py",
        (
            "klein: a processor is called as a tokenizer",
            '        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # within',
            "        # within",
            "test_a_long_prompt_is_measured_by_the_tokenizer_in_a_processor",
        ),
    ),
    *planted(
        "models/families/network.py",
        "models/test_flux2.py",
        (
            "klein: features are those of the text",
            "return tokens[:, -count:]",
            "return tokens[:, :count]",
            "tests/models/test_flux2.py::test_features_of_single_blocks_are_the_images_tokens",
        ),
    ),
]
