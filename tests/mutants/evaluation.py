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
]
