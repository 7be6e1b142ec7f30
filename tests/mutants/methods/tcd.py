"""Planted defects of the method tcd."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/tcd.py",
        "methods/test_tcd.py",
        (
            "tcd: the target keeps its graph",
            ("        with torch.no_grad():\n            target = roles.target("),
            ("        if True:\n            target = roles.target("),
            "test_no_gradient_flows_through_the_target",
        ),
        (
            "tcd: the target stays where the teacher landed",
            "batch.cond, end=end).at(s)",
            "batch.cond, end=end).at(u)",
            "test_a_step_is_the_papers",
        ),
        (
            "tcd: s = u is never drawn",
            "(fraction * (index + 1)).to(torch.int64)",
            "(fraction * index).to(torch.int64)",
            "test_draws_cover_every_hop_and_every_end_below_it",
        ),
        (
            "tcd: s may lie above u",
            "(fraction * (index + 1)).to(torch.int64)",
            "(fraction * (index + 2)).to(torch.int64)",
            "test_draws_cover_every_hop_and_every_end_below_it",
        ),
        (
            "tcd: the grid's end is never drawn",
            "(fraction * (index + 1)).to(torch.int64)",
            "(fraction * (index + 1)).ceil().to(torch.int64).minimum(index)",
            "test_draws_cover_every_hop_and_every_end_below_it",
        ),
        (
            "tcd: the student is told u instead of s",
            "end = s if self.settings.tell_end else None",
            "end = u if self.settings.tell_end else None",
            "test_a_step_is_the_papers[vp-epsilon-told end-full-True]",
        ),
        (
            "tcd: the student jumps to u",
            "distance(pred.at(shared.s), shared.target",
            "distance(pred.at(shared.u), shared.target",
            "test_a_step_is_the_papers",
        ),
    ),
]
