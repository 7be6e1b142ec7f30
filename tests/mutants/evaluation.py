"""Planted defects of evaluation."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "evaluation/metrics.py",
        "evaluation/test_measured.py",
        (
            "metrics: resampled groups all count once",
            'squares = torch.einsum("g,gij->ij", weights, self.squares)',
            "squares = self.squares.sum(dim=0)",
            "test_groups_have_the_moments_of_their_samples",
        ),
        (
            "metrics: a picture's distance to itself counts in the spread",
            "per_prompt * (per_prompt - 1)",
            "per_prompt * per_prompt",
            "test_spread_against_loops",
        ),
    ),
    *planted(
        "evaluation/measured.py",
        "evaluation/test_measured.py",
        (
            "measured: the gap is divided by the student's distance",
            "return (few - student) / (few - many)",
            "return (few - student) / (few - 0 * many)",
            "test_the_gap_is_closed_by_the_teacher_itself_and_not_by_a_copy",
        ),
    ),
    *planted(
        "evaluation/resampled.py",
        "evaluation/test_resampled.py",
        (
            "resampled: distances of many features forget what counts twice",
            "centred = (products - mean_a @ b.T) * (w / (n - 1)).sqrt()[:, None]",
            "centred = (products - mean_a @ b.T) / (n - 1).sqrt()",
            "test_frechet_distance_by_moments_and_by_inner_products",
        ),
        (
            "resampled: the mean of many features is not taken off",
            "products - mean_a @ b.T",
            "products",
            "test_frechet_distance_by_moments_and_by_inner_products",
        ),
        (
            "resampled: an image drawn twice is a pair with itself",
            "pairs.fill_diagonal_(0)",
            "pairs.fill_diagonal_(1)",
            "test_kid_resampled_leaves_out_pairs_of_a_group",
        ),
        (
            "resampled: images that were not drawn are recalled",
            '"recall": share(lambda there: recalled[there].amax(dim=0))',
            '"recall": share(lambda there: recalled.amax(dim=0))',
            "test_overlap_resampled_by_loops",
        ),
        (
            "resampled: groups count once in a mean",
            "(w @ rights) / (w @ all_stated)",
            "(w.clamp(max=1) @ rights) / (w.clamp(max=1) @ all_stated)",
            "test_mean_curve",
        ),
        (
            "resampled: images of a group count once in a distance of many features",
            "return weights.double().repeat_interleave(counts)",
            "return weights.double().clamp(max=1).repeat_interleave(counts)",
            "test_frechet_distance_by_moments_and_by_inner_products",
        ),
    ),
    *planted(
        "evaluation/measured.py",
        "evaluation/test_independent.py",
        (
            "measured: an image is compared with the teacher's of another prompt",
            "(images - others).double()",
            "(images - others.roll(1, 0)).double()",
            "test_every_figure_against_numpy",
        ),
        (
            "measured: neighbourhoods of more images than are generated",
            "equal = real.features[: len(self.features)]",
            "equal = real.features",
            "test_every_figure_against_numpy",
        ),
        (
            "measured: an image whose prompt states nothing is right",
            "[j.all_right and j.stated for j in judged]",
            "[j.all_right for j in judged]",
            "test_every_figure_against_numpy",
        ),
    ),
    *planted(
        "evaluation/prompt_set.py",
        "evaluation/test_independent.py",
        (
            "measured: the perceptual distance is that of an image to itself",
            "self.perceptual(images, self.teacher)",
            "self.perceptual(images, images)",
            "test_every_figure_against_numpy",
        ),
    ),
    *planted(
        "evaluation/metrics.py",
        "evaluation/test_independent.py",
        (
            "metrics: patches stand side by side",
            "unfold(2, PATCH, PATCH // 2)",
            "unfold(2, PATCH, PATCH)",
            "test_every_figure_against_numpy",
        ),
        (
            "metrics: KID counts an image and itself as a pair",
            "(k.sum() - k.diagonal().sum()) / (n * (n - 1))",
            "k.sum() / n**2",
            "test_every_figure_against_numpy",
        ),
        (
            "metrics: an interval stands where resampled sets lie",
            "shift = plain - float(values.median())",
            "shift = 0.0",
            "test_spread_and_intervals_against_numpy",
        ),
    ),
    *planted(
        "models/pretrained.py",
        "evaluation/test_text_aligned.py",
        (
            "features: weights that no file has are random",
            "    if lost:",
            "    if False:",
            "test_a_network_that_cannot_be_loaded_is_one_sentence",
        ),
        (
            "features: SigLIP sees pixels as DINOv2 does",
            '_HALF if kind.startswith("siglip") else _IMAGENET',
            "_IMAGENET",
            "test_features_by_name_are_those_of_transformers[siglip]",
        ),
    ),
    *planted(
        "models/rewards.py",
        "evaluation/test_text_aligned.py",
        (
            "rewards: prompts are longer than the model's positions",
            "max_length=longest",
            "max_length=77",
            "test_the_clip_score_of_a_folder_is_transformers_own_cosine[clip]",
        ),
        (
            "rewards: a model without a tokenizer reads nothing in every prompt",
            "if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):",
            "if False:",
            "test_a_network_that_cannot_be_loaded_is_one_sentence",
        ),
    ),
    *planted(
        "runs/measured_on.py",
        "evaluation/test_text_aligned.py",
        (
            "measured on: captions are rated that belong to other images",
            "captions[i : i + ROWS]",
            "captions[:ROWS][: len(part)]",
            "test_scores_of_planted_embeddings_are_closed_forms",
        ),
        (
            "measured on: of two models of one figure the last one counts",
            "if kinds.count(kind) > 1",
            "if kinds.count(kind) > 2",
            "test_a_figure_has_one_model",
        ),
    ),
    *planted(
        "runs/distill.py",
        "evaluation/test_text_aligned.py",
        (
            "distill: networks that measure are looked for when training begins",
            "    check_networks([recipe])\n",
            "",
            "test_networks_are_looked_for_before_a_run_begins",
        ),
    ),
    *planted(
        "runs/chain.py",
        "evaluation/test_text_aligned.py",
        (
            "chain: a later stage's networks are looked for hours later",
            "    check_networks(stage.recipe for stage in chain.stages if stage.recipe is not None)\n",
            "",
            "test_networks_are_looked_for_before_a_run_begins",
        ),
    ),
    *planted(
        "runs/validation.py",
        "runs/test_measured_on.py",
        (
            "validation: the teacher is measured in the student's place",
            "run.roles.views()[run.role].uncounted(), card.guidance_scale",
            "run.teacher.denoiser.uncounted(), card.guidance_scale",
            "test_the_reference_is_made_once",
        ),
    ),
    *planted(
        "runs/first_teacher.py",
        "runs/test_measured_on.py",
        (
            "lineage: the first teacher is measured in another number format",
            '"dtype": DTYPES[teacher.dtype]',
            '"dtype": DTYPES["fp32"]',
            "test_the_first_teacher_is_held_as_in_training",
        ),
    ),
    *planted(
        "planning/validating.py",
        "planning/test_estimate.py",
        (
            "estimate: networks that measure take no memory",
            "for tensor in (*tensors, *kept)",
            "for tensor in kept",
            "test_validation_is_counted_where_students_are_measured[features]",
        ),
        (
            "estimate: a measurement needs what sampling needs alone",
            "max(sampling, images + max([decoding, images, *seen]))",
            "sampling",
            "test_validation_is_counted_where_students_are_measured[features]",
        ),
    ),
]
