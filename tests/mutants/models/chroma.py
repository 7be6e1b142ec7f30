"""Planted defects of Chroma."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "models/families/chroma.py",
        "models/test_chroma.py",
        (
            "chroma: the mask hides the padding",
            "attention_mask=mask,",
            "attention_mask=mask.bool(),",
            "tests/models/test_pipeline_images.py::test_an_image_is_the_pipelines_own[chroma]",
        ),
        (
            "chroma: the texts have no mask",
            'cond["prompt_bias"].to(x.dtype)',
            'torch.ones_like(cond["prompt_bias"])',
            "tests/models/test_pipeline_images.py::test_an_image_is_the_pipelines_own[chroma]",
        ),
        (
            "chroma: checkpointing drops the mask",
            "forgotten = id(block) in singles and len(args) == 3",
            "forgotten = False",
            "test_checkpointing_in_diffusers_drops_the_mask_and_here_it_does_not",
        ),
        (
            "chroma: the mask is handed over twice once diffusers does it",
            "id(block) in singles and len(args) == 3",
            "id(block) in singles",
            "test_a_mask_that_diffusers_hands_over_is_left_alone",
        ),
        (
            "chroma: a shorter network has other modulations",
            "nn.ModuleList([*kept, *passed])",
            "kept",
            "test_features_of_any_block_are_those_of_the_whole_forward",
        ),
    ),
    *planted(
        "models/families/network.py",
        "models/test_chroma.py",
        (
            "chroma: features are those of the text",
            "return tokens[:, -count:]",
            "return tokens[:, :count]",
            "test_features_of_any_block_are_those_of_the_whole_forward",
        ),
    ),
]
