"""The card of a student: how to sample from it. ``few_step.json`` beside the weights, and a header of their file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fewstep.data.files import replace_text
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.guidance import off_is_one
from fewstep.sampling import SAMPLERS, Sampler, make_sampler

CARD_FILE = "few_step.json"


@dataclass(frozen=True)
class Card:
    """How to sample from a student.

    Attributes:
        method: the method that trained it. sampler: that method's sampler.
        num_inference_steps, eta, original_inference_steps: of that sampler.
        timesteps: of that sampler, where they are not on its own grid.
        weights: "lora" or "full". rank: of the LoRA.
        teacher: the model it was distilled from; ``../../<stage>/student`` is an earlier stage of the same run.
        guidance_scale: classifier-free guidance to sample with; 1 (off) where the teacher's guidance is distilled.
        prediction_type: kind of its prediction; empty: its teacher's.
        extra_inputs: inputs beside the prompt: "end" (the target time s), "guidance_embed".
        bank: the times between which it has last layers (`fewstep.models.bank`), N + 1, decreasing; empty: it has one.
        bank_steps: numbers of steps that it was trained for, divisors of N, where it has a bank.
        guidance_embed: scale for its guidance-scale embedding, or its teacher's; None: the default.
        target_times: of an export that holds its target times in its weights: (t, s) of every step for which they are
            right; empty: it holds none.
        image_size: side of its images in pixels; None is its teacher's own.
        steps: training steps. forward_equivalents: their compute cost, with that of the runs it builds on, in teacher
            forward passes (forward 1, backward 2).
        costs: the parts of that cost by the hash of each run's recipe: a run that two others start from counts once.
    """

    method: str
    sampler: str
    num_inference_steps: int
    weights: Literal["lora", "full"]
    teacher: str
    eta: float = 0.0
    original_inference_steps: int = 50
    rank: int = 0
    guidance_scale: float = 1.0
    timesteps: tuple[float, ...] = ()
    prediction_type: str = ""
    extra_inputs: tuple[str, ...] = ()
    bank: tuple[float, ...] = ()
    bank_steps: tuple[int, ...] = ()
    guidance_embed: float | None = None
    target_times: tuple[tuple[float, float], ...] = ()
    image_size: int | None = None
    steps: int = 0
    forward_equivalents: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    format: int = 1

    @property
    def beside_weights(self) -> str:
        """What the student has beside the weights of its teacher's network, in words; empty where there is nothing."""
        extras = f"the extra inputs {' and '.join(self.extra_inputs)}" if self.extra_inputs else ""
        bank = f"{len(self.bank) - 1} last layers" if self.bank else ""
        return " and ".join(filter(None, (extras, bank)))

    def as_json(self) -> str:
        """Its fields in one line, for headers of files."""
        return json.dumps(asdict(self))

    def save(self, folder: Path, **more: Any) -> None:
        """Write `CARD_FILE` into ``folder``, with ``more`` keys after its own; the file appears whole or not at all."""
        replace_text(folder / CARD_FILE, json.dumps({**asdict(self), **more}, indent=1) + "\n")


def load_card(folder: Path) -> Card:
    """The card of a student folder.

    Raises:
        ValueError: one sentence when the folder holds no student of ours.
    """
    try:
        data = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != 1:
            raise ValueError("unknown format")
        card = TypeAdapter(Card).validate_python(data)
        _check_bank(card)
        return replace(card, guidance_scale=off_is_one(card.guidance_scale))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"The card {folder / CARD_FILE} is damaged: {key}: {first['msg']}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no student: {CARD_FILE} is missing or damaged ({error}).") from None


def _check_bank(card: Card) -> None:
    times, count = np.asarray(card.bank), len(card.bank) - 1
    if not np.isfinite(times).all() or (np.diff(times) >= 0).any():
        raise ValueError("bank must be decreasing times")
    if bool(card.bank) != bool(card.bank_steps) or any(not 1 <= n <= count or count % n for n in card.bank_steps):
        raise ValueError("bank_steps must divide the number of intervals between the times of bank")


def refuse_other_times(card: Card, sampler: Sampler, schedule: Schedule) -> None:
    """Refuse a run at other times than those whose target times the weights of an export hold.

    Raises:
        ValueError: one sentence.
    """
    known, width = np.asarray(card.target_times), 1e-6 * abs(schedule.start - schedule.end)
    if len(known) and any(np.abs(known - asked).max(axis=1).min() > width for asked in sampler.targets(schedule)):
        raise ValueError(
            f"The weights of this export hold the target times of its own {len(known)} steps and are right for these "
            "alone: leave steps, times, eta, sampler, strength and size out, or sample from the run itself."
        )


def sampler_of(card: Card, name: str | None = None, **options: Any) -> Sampler:
    """The sampler of a card; ``name`` and ``options`` (None: not given) override its own.

    Raises:
        ValueError: an option is invalid, or the card's student was trained for another number of steps, at times of
            its own or with a bank of last layers.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if card.bank and not given.keys() & {"timesteps", "sigmas"}:
        steps = int(given.pop("num_inference_steps", card.num_inference_steps))
        given["timesteps"] = block_edges(card, steps)[:-1]
    if card.timesteps and not given.keys() & {"timesteps", "sigmas", "timestep_spacing"}:
        given["timesteps"] = own_times(card, given.pop("num_inference_steps", None))
    if not given.keys() & {"num_inference_steps", "timesteps", "sigmas"}:
        given["num_inference_steps"] = card.num_inference_steps
    if name in (None, card.sampler) and card.sampler in SAMPLERS:
        for key in {"eta", "original_inference_steps"} & SAMPLERS[card.sampler].options():
            given.setdefault(key, getattr(card, key))
    return make_sampler(name or card.sampler, **given)


def own_times(card: Card, steps: int | None) -> tuple[float, ...]:
    """The times at which a student was trained that has times of its own, whatever the sampler.

    Raises:
        ValueError: it was trained for another number of steps, on whose grid it would begin elsewhere.
    """
    if steps not in (None, len(card.timesteps)):
        listed = ", ".join(f"{time:g}" for time in card.timesteps)
        raise ValueError(
            f"This student was trained at times of its own ({listed}) and takes {len(card.timesteps)} "
            f"step{'s' if len(card.timesteps) > 1 else ''}, not {steps}: leave the number out, or give times."
        )
    return card.timesteps


def block_edges(card: Card, steps: int) -> tuple[float, ...]:
    """The times between which a student with a bank of last layers takes its steps: every L-th of the bank's.

    Raises:
        ValueError: it was not trained for so many steps.
    """
    count = len(card.bank) - 1
    if steps not in card.bank_steps:
        trained = " or ".join(map(str, sorted(card.bank_steps)))
        raise ValueError(
            f"This student has {count} last layers and was trained to take {trained} steps, not {steps}: its blocks "
            "begin at other times."
        )
    return card.bank[:: count // steps]
