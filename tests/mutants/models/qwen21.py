"""Planted defects of Qwen-Image-2.1."""

from tests.mutants.mutant import planted

TOGETHER = "test_neighbours_with_texts_of_one_length_are_called_together_and_others_apart"

MUTANTS = [
    *planted(
        "models/families/qwen21.py",
        "models/test_qwen21.py",
        (
            "causal qwen: texts of unequal lengths are called together",
            "row[0] if is_spread(self) else row[1]",
            "row[0] if is_spread(self) else 0",
            TOGETHER,
        ),
        (
            "causal qwen: processes of a sharded network call it unequally often",
            "row[0] if is_spread(self) else row[1]",
            "row[1]",
            TOGETHER,
        ),
        (
            "causal qwen: images are encoded transparent",
            "torch.ones_like(images[:, :1])",
            "torch.zeros_like(images[:, :1])",
            "test_images_are_encoded_opaque",
        ),
        (
            "causal qwen: students of Turbo are sampled at its levels",
            "self.pipeline.register_to_config(sample_sigmas=None)",
            "pass",
            "test_turbo_is_sampled_at_its_own_levels_and_its_students_at_theirs",
        ),
        (
            "causal qwen: sides may be odd numbers of latents",
            "return _SLOT * self.down",
            "return self.down",
            "test_sides_are_multiples_of_thirty_two_pixels",
        ),
        (
            "causal qwen: extra inputs reach the text's time too",
            "torch.cat([extra, torch.zeros_like(extra[:1])])",
            "torch.cat([extra, extra[:1]])",
            "test_extra_inputs_are_added_to_the_images_time_and_not_to_the_texts",
        ),
        (
            "causal qwen: a step on the meta device has no backward",
            "_RepeatsOnMeta() if x.is_meta else nullcontext()",
            "nullcontext()",
            "test_a_step_is_rehearsed_on_the_meta_device",
        ),
    ),
    *planted(
        "models/families/qwen21.py",
        "models/test_pipeline_images.py",
        (
            "causal qwen: the text's last tokens are taken for the image's",
            "[:, -height * width :]",
            "[:, : height * width]",
            "test_an_image_is_the_pipelines_own[qwen21]",
        ),
        (
            "causal qwen: the image's slots are as many as its tokens",
            "tokens + height * width // _SLOT**2",
            "tokens + height * width",
            "test_an_image_is_the_pipelines_own[qwen21]",
        ),
    ),
]
