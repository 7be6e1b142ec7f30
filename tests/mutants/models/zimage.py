"""Planted defects of Z-Image."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "models/families/zimage.py",
        "models/test_pipeline_images.py",
        (
            "z-image: its output has the sign of the flow",
            "-torch.stack(output)",
            "torch.stack(output)",
            "test_an_image_is_the_pipelines_own[z-image]",
        ),
        (
            "z-image: it is told t",
            "list(x.unsqueeze(2)), 1 - t, texts",
            "list(x.unsqueeze(2)), t, texts",
            "test_an_image_is_the_pipelines_own[z-image]",
        ),
        (
            "z-image: padded rows of a text are read too",
            "[text[:length] for text, length",
            "[text for text, length",
            "test_an_image_is_the_pipelines_own[z-image]",
        ),
    ),
    *planted(
        "models/families/zimage.py",
        "models/test_family_facts.py",
        (
            "z-image: the levels are the scheduler's own",
            "    passes_sigmas = True\n",
            "    passes_sigmas = False\n",
            "test_whether_its_pipeline_hands_over_levels_of_its_own[zimage]",
        ),
    ),
    *planted(
        "models/lora_files/keys.py",
        "models/test_zimage.py",
        (
            "z-image: published files of VideoX-Fun are of another model",
            '("lora_unet__", "lora_unet_",',
            '("lora_unet_",',
            "test_published_loras_are_read_by_any_of_their_names[lora_unet__-_]",
        ),
    ),
    *planted(
        "models/families/zimage.py",
        "models/test_zimage.py",
        (
            "z-image: its pipeline is told guidance counted from 1",
            '{"guidance_scale": scale - 1}',
            '{"guidance_scale": scale}',
            "test_guidance_counts_from_0_in_its_pipeline",
        ),
        (
            "z-image: a discriminator sees the text's tokens",
            "return tokens[:, :count]",
            "return tokens[:, -count:]",
            "test_the_images_tokens_are_the_first",
        ),
        (
            "z-image: a network that takes images too is a teacher",
            "if self.base.config.siglip_feat_dim is not None:",
            "if False:",
            "test_networks_that_take_images_too_are_refused",
        ),
    ),
]
