"""Planted defects of Krea 2."""

from tests.mutants.mutant import planted

IMAGES = "test_an_image_is_the_pipelines_own"
MUTANTS = [
    *planted(
        "models/families/krea2.py",
        "models/test_pipeline_images.py",
        (
            "krea: a distilled model is shifted by the image's size",
            'if settings.get("is_distilled") else',
            'if settings.get("is_turbo") else',
            f"{IMAGES}[krea2 turbo]",
        ),
        (
            "krea: padded tokens are read in place of the template's end",
            "texts = [text[real] for",
            "texts = [text[: int(real.sum())] for",
            f"{IMAGES}[krea2]",
        ),
        (
            "krea: the image's tokens are all in one place",
            "torch.cat([of_image.new_zeros(embeds.shape[1], 3), of_image])",
            "torch.cat([of_image.new_zeros(embeds.shape[1], 3), 0 * of_image])",
            f"{IMAGES}[krea2]",
        ),
    ),
    *planted(
        "models/families/krea2.py",
        "models/test_krea2.py",
        (
            "krea: its pipeline is told guidance counted from 1",
            '{"guidance_scale": scale - 1}',
            '{"guidance_scale": scale}',
            "test_guidance_counts_from_0_in_its_pipeline",
        ),
        (
            "krea: a distilled model is sampled as a teacher of fifty steps",
            '_DISTILLED_STEPS if self.settings.get("is_distilled") else None',
            "None",
            "test_what_is_distilled_says_so",
        ),
        (
            "krea: ComfyUI is said to read the whole network",
            "    comfyui_networks = False",
            "    comfyui_networks = True",
            "test_comfyui_reads_its_loras_and_no_whole_network_under_diffusers_names",
        ),
        (
            "krea: long prompts are said to be read to the template's end",
            "text_tokens = _TOKENS - _SUFFIX",
            "text_tokens = _TOKENS",
            "test_a_prompt_of_507_tokens_is_read_and_one_more_is_not",
        ),
    ),
    *planted(
        "models/families/network.py",
        "models/test_krea2.py",
        (
            "krea: a discriminator sees the text's tokens",
            "return tokens[:, -count:]",
            "return tokens[:, :count]",
            "test_the_images_tokens_are_the_last",
        ),
    ),
]
