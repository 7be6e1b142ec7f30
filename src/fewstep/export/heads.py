"""The last layers of a student that has one for every step (`fewstep.models.bank`), as other programs hold them.

    --to heads    a file as PDD's authors publish it: the LoRA as <layer>.lora_down and .lora_up, and the last layer of
                  each step as <last layer>.weight [steps, out, in]; beside it pdd_config.json with the levels

The layers of a block are fused to one by the lengths of their intervals. Programs that exchange the last layer from
step to step read such files (`fewstep.models.lora_files.heads`); diffusers' LoRA loader refuses them. fewstep reads the
file back before the export appears.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.files import write_text
from fewstep.export.header import write
from fewstep.export.lora import PARTS, layers
from fewstep.export.round_trip import RoundTrip
from fewstep.models.bank import fused, interval_lengths
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.models.lora_files import tensor_names
from fewstep.models.lora_files.heads import CONFIG_FILE
from fewstep.students.card import Card, block_edges
from fewstep.students.exported import Exported, open_export
from fewstep.students.student import LORA_FILE

CODE = """import fewstep

model = fewstep.load("THIS_FOLDER")
model.sample("a prompt")[0].save("image.png")"""
"""The lines of Python that use such an export."""
REMARK = (
    "Each step has a last layer of its own: use exactly these steps and levels, with a program that exchanges the last "
    "layer as fewstep does; a LoRA loader that drops it gives worse images without a word. Names, shapes and "
    f"{CONFIG_FILE} are those of the files that VideoX-Fun publishes."
)


def refuse_bank(card: Card, to: str = "") -> None:
    """Refuse a student whose last layer changes from step to step, where a program has one for all steps.

    Args:
        to: the form of the export: "heads" holds a last layer for each step of a LoRA.

    Raises:
        ValueError: one sentence: it takes more than one step; or for "heads" it is another student.
    """
    if to == "heads":
        if not card.bank:
            forms = "lora, merged or diffusers" if card.weights == "lora" else "merged or diffusers"
            raise ValueError(f"This student has one last layer for all steps: export --to {forms}.")
        if card.weights != "lora":
            raise ValueError(
                "This student has full weights, and --to heads holds a LoRA: sample it with fewstep sample."
            )
        return
    if card.bank and card.num_inference_steps > 1:
        other = ", or export a transformer's --to heads, one file for fewstep.load" if card.weights == "lora" else ""
        raise ValueError(
            "This student has a last layer for every step, which no pipeline of diffusers exchanges: sample it with "
            f"fewstep sample{other}."
        )


def card_of_heads(card: Card) -> Card:
    """The card of the export: its last layers are those of its steps."""
    steps = card.num_inference_steps
    return replace(card, bank=block_edges(card, steps), bank_steps=(steps,))


def write_heads(
    part: Path,
    teacher: Teacher,
    card: Card,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    dtype: torch.dtype,
) -> Path:
    """Write the LoRA and the last layers of its steps as one file in ``part``, their settings beside it; returns it.

    Args:
        tensors: as in `fused_layers`.

    Raises:
        ValueError: the network is a UNet, whose last layer is no matrix.
    """
    network: Any = teacher.denoiser.network
    if teacher.family.part != "transformer":
        raise ValueError(
            "The last layer of a UNet is a convolution, which no program exchanges from step to step: sample this "
            "student with fewstep sample."
        )
    first, _, last = network.last_layer.partition(".")
    adapted = [layer.removeprefix(f"{first}.") for layer in layers(tensors)]
    found = {f"{last}.{name}": t for name, t in fused_layers(teacher, card, tensors).items()}
    for layer in adapted:
        found |= {f"{layer}.{name}": tensors[f"{first}.{layer}.{own}.weight"] for own, name in PARTS.items()}
    settings: dict[str, Any] = {"lora_rank": card.rank, "lora_alpha": float(card.rank)}
    settings["lora_targets"] = ",".join(adapted)
    if teacher.denoiser.schedule.family == "flow":  # elsewhere times are no levels
        steps, sigmas = card.num_inference_steps, list(block_edges(card, card.num_inference_steps))
        settings = {"pdd_num_steps": steps, "pdd_block_size": 1, "pdd_sigmas": sigmas, **settings}
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    write(part / LORA_FILE, {key: t.to(dtype).contiguous() for key, t in found.items()}, {**header, **words})
    write_text(part / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
    return part / LORA_FILE


def check_heads(
    file: Path, card: Card, base: str, device: str, expected: Tensor,
    latents: Callable[[Teacher, Denoiser, Card], Tensor],
) -> RoundTrip:  # fmt: skip
    """Sample from the file alone, on its base; how far its latents are from ``expected``.

    Args:
        card: that of the export. latents: of what it is given.
    """
    found = latents(*open_export(Exported((file,), "heads", base, card), device=device), card)
    gap = float((found - expected).abs().max() / expected.abs().max())
    return RoundTrip(gap, len(layers(tensor_names(file))))


@torch.no_grad()
def fused_layers(teacher: Teacher, card: Card, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last layer of each of the card's steps: ``weight`` [steps, out, in, ...] and ``bias`` [steps, out], float32.

    Args:
        tensors: of the student's file, in which its layers are differences from the teacher's.
    """
    network: Any = teacher.denoiser.network
    layer = network.get_submodule(network.last_layer)
    lengths, steps = interval_lengths(teacher.denoiser.schedule, card.bank), card.num_inference_steps
    edges = range(0, len(lengths) + 1, len(lengths) // steps)
    rows = torch.from_numpy(np.stack([fused(lengths, first, last) for first, last in pairwise(edges)])).float()
    names = [name for name in ("weight", "bias") if f"bank.{name}" in tensors]
    return {
        name: getattr(layer, name).detach().float().cpu()
        + torch.einsum("sn,n...->s...", rows, tensors[f"bank.{name}"].float().cpu())
        for name in names
    }


@torch.no_grad()
def put_last_layer(teacher: Teacher, card: Card, tensors: Mapping[str, Tensor]) -> None:
    """Put the last layer of a student's only step into the teacher's network, in place.

    Raises:
        ValueError: as `refuse_bank`.
    """
    refuse_bank(card)
    network: Any = teacher.denoiser.network
    layer = network.get_submodule(network.last_layer)
    for name, of_steps in fused_layers(teacher, card, tensors).items():
        getattr(layer, name).copy_(of_steps[0])
