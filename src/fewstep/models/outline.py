"""A teacher known by its configs alone: networks on the meta device, which have shapes and take no memory.

Enough to count parameters exactly and to rehearse a training step. No weights are read, so a pipeline of any size is
outlined in about a second on any machine.
"""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import UNetNetwork, as_teacher, first_sentence, shipped
from fewstep.models.helpers import Helpers

_CLIP_TOKENS = 77
_BASE = "unet"  # the part that is distilled; families that call theirs "transformer" will say so here


@dataclass
class Outline:
    """The parts of a pipeline on the meta device, in float32, as `load_teacher` holds them.

    Attributes:
        name: where it came from.
        family: the pipeline's class, or the network's where there is no pipeline around it.
        parts: the networks by their folders' names; ``unet`` is the one that is distilled.
        scheduler: the scheduler's config; empty where there is none.
        tokens: length of an encoded prompt.
    """

    name: str
    family: str
    parts: dict[str, nn.Module]
    scheduler: dict[str, Any]
    tokens: int

    @property
    def base(self) -> Any:
        """The network that is distilled."""
        return self.parts[_BASE]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents at the model's own size.

        Raises:
            ValueError: when the network's config does not tell it.
        """
        size = self.base.config.sample_size
        if size is None:
            raise ValueError(f"The {_BASE} of {self.name} has no sample_size in its config: write it there.")
        height, width = (size, size) if isinstance(size, int) else size
        return self.base.config.in_channels, height, width

    @property
    def image_size(self) -> int | None:
        """Side of the pictures in pixels; None without an autoencoder."""
        vae: Any = self.parts.get("vae")
        return None if vae is None else int(self.latent_shape[1] * 2 ** (len(vae.config.block_out_channels) - 1))

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """(tokens, width) of an encoded prompt."""
        return self.tokens, int(self.base.config.cross_attention_dim)

    def denoiser(self) -> Denoiser:
        """The teacher as methods see it, on a copy of the base: roles may give it adapters.

        Raises:
            ValueError: what fewstep cannot distil yet, in the words of `fewstep.models.families.as_teacher`.
        """
        if getattr(self.base.config, "addition_embed_type", None) or len(self.parts.keys() & _ENCODERS) > 1:
            raise ValueError(f"{self.family} is not supported as a teacher yet: only its parameters are counted.")
        base = copy.deepcopy(self.base)
        if not {"vae", "text_encoder"} <= self.parts.keys() or not self.scheduler:
            return Denoiser(UNetNetwork(base), Schedule.scaled_linear())  # shapes do not depend on the schedule
        parts = {**self.parts, _BASE: base}
        return as_teacher(SimpleNamespace(**parts, scheduler=SimpleNamespace(config=self.scheduler))).denoiser

    def helpers(self, encoder: str = "", gradient_checkpointing: bool = False, vae: nn.Module | None = None) -> Helpers:
        """What losses look through, on the meta device, or where ``vae`` is, a copy of this one with weights.

        Raises:
            ValueError: there is no autoencoder to decode what ``encoder`` shall see, or no such encoder.
        """
        if not {"vae", "text_encoder"} <= self.parts.keys() or not self.scheduler:
            if encoder:
                raise ValueError(f"{self.name} has no autoencoder: a method that looks at pictures needs a pipeline.")
            return Helpers()
        parts = {**self.parts, "vae": vae or self.parts["vae"]}
        pipeline = SimpleNamespace(**parts, scheduler=SimpleNamespace(config=self.scheduler))
        return as_teacher(pipeline).helpers(encoder, gradient_checkpointing)

    def prompts(self, count: int, dtype: torch.dtype, device: str = "meta") -> Cond:
        """``count`` encoded prompts of zeros, and their null."""
        given, null = (torch.zeros(n, *self.prompt_shape, dtype=dtype, device=device) for n in (count, 1))
        return Cond({"prompt_embeds": given}, null={"prompt_embeds": null})


_ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}


def outline(name: str) -> Outline:
    """The outline of ``scenes-64`` (shipped), a diffusers folder, a UNet's folder, or a hub name.

    Weights need not be there. Of a hub model only its configs are fetched.

    Raises:
        ValueError: one sentence when there are no configs, or of a kind that diffusers does not know.
    """
    folder = shipped(name) or _folder(name)
    try:
        if (folder / "model_index.json").is_file():
            return _pipeline(name, folder)
        config = _read(folder / "config.json")
        return Outline(
            name, str(config.get("_class_name")), {_BASE: _network(folder, "diffusers", "")}, {}, _CLIP_TOKENS
        )
    except (OSError, KeyError, TypeError, AttributeError, ImportError, json.JSONDecodeError) as error:
        raise ValueError(f"The teacher '{name}' cannot be outlined from its configs: {first_sentence(error)}") from None


def _folder(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("model_index.json", "config.json")):
            raise ValueError(f"The folder {name} holds no diffusers pipeline (model_index.json is missing).")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"There is no teacher '{name}': give scenes-64, a diffusers folder, or a hub name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"The configs of '{name}' cannot be fetched: {first_sentence(error)}") from None


def _pipeline(name: str, folder: Path) -> Outline:
    index = _read(folder / "model_index.json")
    named = {part: kind for part, kind in index.items() if isinstance(kind, list) and kind[-1]}
    found = {part: kind for part, kind in named.items() if (folder / part / "config.json").is_file()}
    if _BASE not in found:
        raise ValueError(f"{index.get('_class_name')} is not supported as a teacher yet: it has no {_BASE}.")
    parts = {part: _network(folder / part, *kind) for part, kind in found.items()}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokens = _read(tokenizer).get("model_max_length", _CLIP_TOKENS) if tokenizer.is_file() else _CLIP_TOKENS
    config = _read(scheduler) if scheduler.is_file() else {}
    return Outline(name, str(index.get("_class_name")), parts, config, min(int(tokens), _CLIP_TOKENS))


def _network(folder: Path, library: str, kind: str) -> nn.Module:
    """The network of ``folder/config.json`` on the meta device."""
    config = _read(folder / "config.json")
    known = library in ("diffusers", "transformers")
    module: Any = importlib.import_module(library if known else f"diffusers.pipelines.{library}")
    cls = getattr(module, kind or str(config.get("_class_name")))
    with torch.device("meta"):
        if hasattr(cls, "config_class"):  # transformers' way
            network: nn.Module = cls(cls.config_class.from_dict(config))
        else:
            network = cls.from_config(config)
    return network.float()


def _read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise TypeError(f"{path} is no config")
    return data
