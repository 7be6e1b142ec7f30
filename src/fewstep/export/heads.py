"""The last layers of a student that has one for every step (`fewstep.models.bank`), as other programs hold them.

    --to heads    the LoRA in PEFT's layout and, in the same file, the last layer of each step, [steps, out, in]

The layers of a block are fused to one by the lengths of their intervals. Programs that exchange the last layer from
step to step read such files (`fewstep.models.lora_files.heads`); diffusers' LoRA loader does not. fewstep reads the
file back before the export appears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.export.header import write
from fewstep.export.lora import layers, peft_layout
from fewstep.export.round_trip import RoundTrip
from fewstep.models.bank import fused, interval_lengths
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.models.lora_files import tensor_names
from fewstep.students.card import Card, block_times
from fewstep.students.exported import Exported, open_export
from fewstep.students.student import LORA_FILE

CODE = """import fewstep

model = fewstep.load("THIS_FOLDER")
model.sample("a prompt")[0].save("image.png")"""
"""The lines of Python that use such an export."""
REMARK = (
    "Each step has a last layer of its own: use exactly these steps and levels, with a program that exchanges the last "
    "layer as fewstep does; a LoRA loader that drops it gives worse images without a word."
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
            raise ValueError("This student has one last layer for all steps: export --to lora, merged or diffusers.")
        if card.weights != "lora":
            raise ValueError(
                "This student has full weights, and --to heads holds a LoRA: sample it with fewstep sample."
            )
        return
    if card.bank and card.num_inference_steps > 1:
        raise ValueError(
            "This student has a last layer for every step, which no pipeline of diffusers exchanges: sample it with "
            "fewstep sample, or export a transformer's --to heads, one file for fewstep.load."
        )


def card_of_heads(card: Card) -> Card:
    """The card of the export: its last layers are those of its steps."""
    steps = card.num_inference_steps
    return replace(card, bank=(*block_times(card, steps), card.bank[-1]), bank_steps=(steps,))


def write_heads(
    part: Path,
    teacher: Teacher,
    card: Card,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    dtype: torch.dtype,
) -> Path:
    """Write the LoRA and the last layers of its steps as one file in ``part``; returns it.

    Raises:
        ValueError: the network is a UNet, whose last layer is no matrix.
    """
    network: Any = teacher.denoiser.network
    if teacher.family.part != "transformer":
        raise ValueError(
            "The last layer of a UNet is a convolution, which no program exchanges from step to step: sample this "
            "student with fewstep sample."
        )
    lora, more = peft_layout({name: t for name, t in tensors.items() if ".lora_" in name})
    of_steps = fused_layers(teacher, card, tensors)
    found = lora | {f"{network.last_layer}.{name}": t for name, t in of_steps.items()}
    file = part / LORA_FILE
    write(file, {key: t.to(dtype).contiguous() for key, t in found.items()}, {**header, **more})
    return file


def check_heads(
    file: Path, card: Card, base: str, device: str, expected: Tensor,
    latents: Callable[[Teacher, Denoiser, Card], Tensor], limit: float,
) -> RoundTrip:  # fmt: skip
    """Sample from the file alone, on its base; how far its latents are from ``expected``.

    Args:
        card: that of the export. latents: of what it is given.

    Raises:
        ValueError: they differ by more than ``limit`` of the largest one.
    """
    found = latents(*open_export(Exported((file,), "heads", base, card), device=device), card)
    gap = float((found - expected).abs().max() / expected.abs().max())
    if not gap <= limit:
        raise ValueError(
            f"The export was not written: read back, its latents are {gap:.1e} off, more than {limit:.0e}."
        )
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
    block = len(lengths) // steps
    rows = torch.from_numpy(np.stack([fused(lengths, i, i + block) for i in range(0, len(lengths), block)])).float()
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
