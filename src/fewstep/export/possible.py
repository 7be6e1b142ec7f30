"""Whether a student will have an export at all, known from its card and its teacher's schedule before it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fewstep.diffusion.schedule import Schedule
from fewstep.export.fold import refuse_fresh_noise
from fewstep.export.heads import refuse_bank
from fewstep.export.scheduler import plan_scheduler
from fewstep.models.families import Family
from fewstep.students.card import Card, sampler_of

REMEDY = "Remedy:"
"""The word after which an obstacle names the settings without which it would be none."""


def obstacle(card: Card, schedule: Schedule, scheduler: Mapping[str, Any], family: type[Family]) -> str:
    """Why `fewstep export` will refuse this student, and what would change that; empty where it will not.

    Args:
        scheduler: config of the teacher's scheduler.
    """

    def refusal(card: Card) -> str:
        try:
            refuse_fresh_noise(card)
            if family.part != "transformer" or card.weights != "lora":  # --to heads
                refuse_bank(card)
            plan_scheduler(sampler_of(card), schedule, scheduler, card.prediction_type, family)
        except ValueError as error:
            return str(error)
        return ""

    why = refusal(card)
    if not why:
        return ""
    ways = [words for words, changed in _changes(card) if not refusal(changed)]
    return f"{why} {REMEDY} {' or '.join(ways)}." if ways else why


def _changes(card: Card) -> Iterator[tuple[str, Card]]:
    """Other settings to sample the student with, in words."""
    if card.eta:
        yield "sample.eta=0, no fresh noise between the steps,", replace(card, eta=0.0)
    yield "sample.sampler=renoise, which draws all noise anew at every step", replace(card, sampler="renoise", eta=0.0)
