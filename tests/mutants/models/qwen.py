"""Planted defects of Qwen-Image, and of autoencoders of video."""

from tests.mutants.mutant import planted

IMAGES = "test_an_image_is_the_pipelines_own"

MUTANTS = [
    *planted(
        "export/comfyui.py",
        "export/test_comfyui.py",
        (
            "comfyui: a rule of guidance that it does not have is passed over",
            'if scale > 1 and hasattr(teacher.denoiser.network, "guide"):',
            "if False:",
            "test_guidance_is_said_as_comfyui_takes_it",
        ),
    ),
    *planted(
        "models/families/qwen.py",
        "models/test_pipeline_images.py",
        (
            "qwen: guided tokens have the length that guidance gives them",
            "return unpack(guided * (plain.norm(dim=-1, keepdim=True) / length), height, width)",
            "return unpack(guided, height, width)",
            f"{IMAGES}[qwen guided]",
        ),
        (
            "qwen: guided tokens have the length of the flow without a prompt",
            "pack(with_)",
            "pack(without)",
            f"{IMAGES}[qwen against a negative prompt]",
        ),
        (
            "qwen: its levels are not stretched",
            "    passes_sigmas = True\n",
            "",
            f"{IMAGES}[qwen]",
        ),
    ),
    *planted(
        "models/families/qwen.py",
        "models/test_qwen.py",
        (
            "qwen: no prompt is the empty one",
            'self.negative([" "])',
            'self.negative([""])',
            "test_no_prompt_is_a_space_and_long_prompts_end_where_the_pipelines_call_ends_them",
        ),
        (
            "qwen: prompts are as long as its encoder alone reads",
            "_TOKENS = 512",
            "_TOKENS = 1024",
            "test_no_prompt_is_a_space_and_long_prompts_end_where_the_pipelines_call_ends_them",
        ),
        (
            "qwen: models of 2511, which edit, pass by their config",
            " or config.zero_cond_t",
            "",
            "test_models_that_take_an_image_beside_the_prompt_are_refused[QwenImagePipeline-more1]",
        ),
    ),
    *planted(
        "models/families/network.py",
        "models/test_qwen.py",
        (
            "networks: padded tokens of a text are attended to",
            "    return embeds, mask.to(like.device, non_blocking=True)",
            "    return embeds, None",
            "test_a_short_prompt_beside_a_long_one_is_predicted_as_alone",
        ),
    ),
    *planted(
        "models/families/frames.py",
        "models/test_qwen.py",
        (
            "frames: latents are multiplied by the deviation",
            "[1 / std for",
            "[std for",
            "test_images_are_encoded_as_the_pipeline_for_images_encodes_them",
        ),
        (
            "frames: an image is decoded without its mean",
            "self.per_channel(config.latents_mean)",
            "self.per_channel([0.0] * len(config.latents_mean))",
            "test_images_are_encoded_as_the_pipeline_for_images_encodes_them",
        ),
    ),
]
