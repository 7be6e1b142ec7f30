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
]
