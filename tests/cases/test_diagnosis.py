"""A diagnosis of a handful of steps, and of problems whose usual remedies are opposite."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from fewstep.reports import diagnose as module
from fewstep.reports.checks import CHECKS
from fewstep.reports.diagnose import EARLY, examine
from fewstep.reports.history import History
from tests.reports.test_diagnose import RECIPE, records

OPPOSITE = [
    (
        r"lower (training\.learning_rate|the learning rates|the student's learning rate)",
        r"raise training\.learning_rate",
    ),
    (
        r"lower [^.;]*the learning rates|lower training\.learning_rate \(or critic|fewer or smaller updates",
        r"a higher critic_learning_rate|give (it|the critic) more updates",
    ),
    (r"train shorter", r"train longer|continue with fewstep"),
    (r"start again", r"continue with"),
    (r"lower the thresholds or the rank", r"a higher rank"),
    (r"lower [^.;]*guidance_scale", r"raise [^,.;]*guidance_scale"),
    (r"lower training\.ema_decay", r"raise training\.ema_decay"),
    (r"lower that of the distillation loss", r"raise [^,.;]*distillation"),
    (r"raise (training\.)?max_grad_norm", r"lower (training\.)?max_grad_norm"),
]
"""Pieces of advice of which one undoes the other, as they read, in the small: what a person would stumble over."""


def opposite(advice):
    """Pairs of opposite phrases in the advice on several problems."""
    text = [line.lower() for line in advice]
    return [
        (low, high)
        for low, high in OPPOSITE
        for i, j in itertools.permutations(range(len(text)), 2)
        if re.search(low, text[i]) and re.search(high, text[j])
    ]


def advice(names):
    """What is advised where just these problems are found, in the order in which it is printed."""
    found = [(check, ("figures", 10, 300)) for check in CHECKS if check.name in names]
    found.sort(key=lambda pair: not pair[0].fatal)
    return [finding.sentence for finding in module._findings(found)]


CHECK = {check.name: check for check in CHECKS}


def test_the_table_of_opposites_knows_the_advice():
    """The phrases are those of the checks: on their own, unmediated, they do contradict each other."""
    plain = {name: check.advice for name, check in CHECK.items()}
    assert opposite([plain["learning rate too high"], plain["loss not falling"]])
    assert opposite([plain["discriminator too strong"], plain["oscillation"]])
    assert opposite([plain["reward hacking"], plain["unfinished"]])
    assert opposite([plain["learning rate too high"], plain["not finite"]])
    pairs = [pair for pair in itertools.combinations(plain, 2) if opposite([plain[name] for name in pair])]
    assert len(pairs) >= 12
    for one, other in pairs:  # and the checks themselves know them
        assert CHECK[one].opposes(CHECK[other]), (one, other)


def test_no_combination_of_findings_gives_opposite_advice():
    rng = random.Random(0)
    names = list(CHECK)
    several = [tuple(rng.sample(names, rng.randint(4, len(names)))) for _ in range(300)]
    for some in [*itertools.combinations(names, 2), *itertools.combinations(names, 3), *several]:
        found = advice(some)
        assert len(found) == len(some) and not opposite(found), (some, opposite(found))


def test_the_likelier_cause_keeps_its_advice():
    high, flat = advice(["loss not falling", "learning rate too high"])
    assert "Lower training.learning_rate" in high
    assert flat.endswith("See to 'learning rate too high' first, whose remedy is the opposite.")


# ---------------------------------------------------------------- a handful of steps


@pytest.mark.parametrize(("lines", "every"), [(4, 1), (24, 1), (5, 50), (1, 25), (2, 500)])
def test_a_handful_of_steps_is_too_early(lines, every):
    wild = records(lines, student__x0_spread=0.01, student__mean_shift=9.0, learning_rate=1e-9, student__loss=0.1)
    for i, line in enumerate(wild):
        line["step"] = every * (i + 1)
    found = examine(History(wild, {"training": {"steps": 5000, "ema_decay": 0.0}}))
    assert found.healthy and [f.name for f in found.findings] == ["unfinished"]
    first = found.sentences()[0]
    assert first.startswith(f"It is too early for a diagnosis: {lines * every} steps are done and {lines} lines logged")
    assert not any("Nothing stands out" in line for line in found.sentences())


def test_enough_steps_are_judged_and_a_run_that_died_is_at_once():
    wild = records(EARLY, student__x0_spread=0.01)
    for i, line in enumerate(wild):
        line["step"] = i + 1
    assert "lost diversity" in [f.name for f in examine(History(wild, RECIPE)).findings]
    died = examine(History([{"step": 3, "not_finite": "student", "first_bad_step": 2, "learning_rate": 1.0}], RECIPE))
    assert not died.early and not died.healthy


def test_what_is_not_judged_is_listed(tmp_path):
    found = examine(History(records(3), RECIPE))
    assert "too early" in found.unchecked.values() and module.EARLY >= 10
    assert "too early" in str(found) and '"early": "It is too early' in found.as_json()
