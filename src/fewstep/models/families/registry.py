"""The families of teachers, and which of them a pipeline, a network or a name belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.models.families.chroma import Chroma
from fewstep.models.families.family import Family, pipeline_class
from fewstep.models.families.flux import Flux
from fewstep.models.families.flux2 import Flux2, Klein
from fewstep.models.families.krea2 import Krea2
from fewstep.models.families.pixart import PixArt
from fewstep.models.families.qwen import QwenImage
from fewstep.models.families.qwen21 import QwenImage21
from fewstep.models.families.sana import Sana, SanaSprint
from fewstep.models.families.sd3 import StableDiffusion3
from fewstep.models.families.unet import StableDiffusion, StableDiffusionXL
from fewstep.models.families.zimage import ZImage

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArt,
    Sana,
    SanaSprint,
    QwenImage,
    ZImage,
    Klein,
    Flux2,
    Krea2,
    Chroma,
    QwenImage21,
)


def find_family(pipeline: Any, size: int | None = None) -> Family:
    """The family of a pipeline, recognised by its network.

    Raises:
        ValueError: one sentence when it is none of those that can be distilled, or ``size`` does not fit.
    """
    return class_of(pipeline)(pipeline, size)


def class_of(pipeline: Any) -> type[Family]:
    """The class of a pipeline's family; raises as `find_family`."""
    for cls in FAMILIES:
        if cls.fits(pipeline):
            return cls
    titles = [cls.title for cls in FAMILIES]
    raise ValueError(
        f"{pipeline_class(pipeline)} is not supported as a teacher: use {', '.join(titles[:-1])} or {titles[-1]}."
    )


def family_in(folder: Path) -> type[Family] | None:
    """The class of the family of a pipeline's folder by its configs alone; None where it is none of these."""
    for cls in FAMILIES:
        try:
            config = json.loads((folder / cls.part / "config.json").read_text(encoding="utf-8"))
            if cls.fits_config(config):
                return cls
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return None


def family_named(name: str) -> type[Family] | None:
    """The family that `fewstep checkpoints` calls ``name``; None for one that cannot be sampled here."""
    return next((cls for cls in FAMILIES if name in cls.names), None)


def parts() -> tuple[str, ...]:
    """Where pipelines keep the network that is distilled: ``unet``, ``transformer``."""
    return tuple(dict.fromkeys(cls.part for cls in FAMILIES))


def part_of(network: nn.Module) -> str:
    """Where a pipeline would keep this network."""
    return next((cls.part for cls in FAMILIES if cls.network_class == type(network).__name__), Family.part)


def licence_of(base: str) -> str:
    """Licence of a base model as its hub page names it; empty if it is not known here."""
    return next((cls.licences[base] for cls in FAMILIES if base in cls.licences), "")
