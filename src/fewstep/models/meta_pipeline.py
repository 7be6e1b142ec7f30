"""A teacher from its configs alone: networks on the meta device, which have shapes and take no memory.

That is enough to count parameters exactly and to measure the memory of a training step. No weights are read, so a
pipeline of any size is built in about a second on any machine.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import CLIP_TOKENS, Family, as_teacher, find_family, parts_of, registry, shipped
from fewstep.models.families.folder import is_part
from fewstep.models.families.load import expanded, local_folder
from fewstep.models.families.single_file import config_of, is_single_file, known_configs, scheduler_settings
from fewstep.models.families.teacher import upcast_autoencoder
from fewstep.models.helpers import Helpers
from fewstep.models.hub import asking_hub, is_cached, short_error
from fewstep.models.rewards import open_reward


@dataclass
class MetaPipeline:
    """The parts of a pipeline on the meta device, in float32 unless loaded in another dtype.

    Attributes:
        name: where it came from.
        kind: class of the pipeline, or of the network where there is no pipeline around it.
        parts: the networks by their folders' names.
        scheduler: the scheduler's config; empty where there is none.
        tokens: length of a prompt that CLIP has encoded.
        size: side of the images in pixels; None takes the model's own.
        settings: of the pipeline itself, numbers, texts and lists of them (`Family.settings`).
    """

    name: str
    kind: str
    parts: dict[str, nn.Module]
    scheduler: dict[str, Any]
    tokens: int
    size: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """Name of the network that is distilled."""
        return next(part for part in registry.parts() if part in self.parts)

    @property
    def base(self) -> Any:
        """The network that is distilled."""
        return self.parts[self.part]

    def family(self, base: Any = None) -> Family:
        """The family, around ``base`` in the place of its own network.

        Raises:
            ValueError: as `fewstep.models.families.as_teacher`.
        """
        return find_family(self._pipeline({} if base is None else {self.part: base}), self.size)

    def _pipeline(self, other: Mapping[str, Any]) -> Any:
        """An object with the parts of a pipeline as attributes, with those of ``other`` in the place of its own.

        A network's folder has no scheduler; it gets its family's `any_scheduler`, on which shapes do not depend.
        """
        made = SimpleNamespace(**{**self.parts, **other}, name=self.kind, config=self.settings)
        made.scheduler = SimpleNamespace(config=self.scheduler or registry.class_of(made).any_scheduler)
        return made

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """As `Family.latent_shape`.

        Raises:
            ValueError: the network's config does not give the height and width.
        """
        return self.family().latent_shape

    @property
    def image_size(self) -> int | None:
        """Side of the images in pixels; None without an autoencoder."""
        return self.latent_shape[-2] * self.family().down if "vae" in self.parts else None

    def denoiser(self) -> Denoiser:
        """The teacher's denoiser, on a copy of the base: roles may add adapters to it.

        Raises:
            ValueError: as `fewstep.models.families.as_teacher`.
        """
        family = self.family(copy.deepcopy(self.base))
        family.base.eval().requires_grad_(False)
        return family.denoiser()

    def helpers(
        self,
        encoder: str = "",
        gradient_checkpointing: bool = False,
        vae: nn.Module | None = None,
        rewards: Sequence[str] = (),
    ) -> Helpers:
        """`Teacher.helpers` on the meta device, or on that of ``vae``, a copy of the autoencoder with weights.

        Args:
            rewards: names of reward models, of which only the shapes are used.

        Raises:
            ValueError: there is no autoencoder to decode images with, or no such encoder or reward model.
        """
        if "vae" not in self.parts:
            if encoder or rewards:
                raise ValueError(f"{self.name} has no autoencoder: a method that decodes images needs a pipeline.")
            return Helpers()
        found = as_teacher(self._pipeline({"vae": vae or self.parts["vae"]}), size=self.size).helpers(
            encoder, gradient_checkpointing
        )
        liked = {name: open_reward(name, "meta", measures=True) for name in rewards}
        if vae is not None:
            for reward in liked.values():
                _empty(reward.network, str(next(vae.parameters()).device))
        behind = (*found.networks, *(reward.network for reward in liked.values()))
        return replace(found, rewards=liked, networks=behind)

    def prompts(self, count: int, dtype: torch.dtype, device: str = "meta") -> Cond:
        """``count`` encoded prompts of zeros, with the null condition."""
        return self.family().zeros(count, self.tokens, dtype, device)


def outline(
    name: str, size: int | None = None, dtype: torch.dtype = torch.float32, config: str | None = None
) -> MetaPipeline:
    """`MetaPipeline` of ``scenes-64`` (shipped), a diffusers folder, a network's folder, a single file, or a hub name.

    Weights need not be there: only the configs of a hub model are downloaded, and not even these of the models whose
    configs come with fewstep.

    Raises:
        ValueError: one sentence when there are no configs, or diffusers has no such class.
    """
    name, config, _ = parts_of(name, config)
    single = is_single_file(name)
    if single:
        folder = config_of(expanded(name), config)
    else:
        local = shipped(name) or local_folder(name, "model_index.json", "config.json")
        folder = local or known_configs(name) or _downloaded_configs(name)
    try:
        if (folder / "model_index.json").is_file():
            found = _pipeline(name, folder)
        else:
            network = _network(folder, "diffusers", "")
            parts = {registry.part_of(network): network}
            found = MetaPipeline(name, type(network).__name__, parts, {}, CLIP_TOKENS)
    except (OSError, KeyError, TypeError, AttributeError, ImportError, json.JSONDecodeError) as error:
        raise ValueError(f"The teacher '{name}' cannot be built from its configs: {short_error(error)}") from None
    found.size = size
    if single:
        found.scheduler |= scheduler_settings(expanded(name), found.scheduler)
    for network in found.parts.values():
        nn.Module.to(network, dtype)  # diffusers' own .to warns about layers that should stay in float32
    upcast_autoencoder(found.parts.get("vae"))
    return found


@torch.no_grad()
def _empty(network: nn.Module, device: str) -> None:
    """Zeros in the place of meta tensors: the memory of a call does not depend on the values."""
    allocate(network, device)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.zero_()


def allocate(network: nn.Module, device: str) -> nn.Module:
    """``network`` on ``device``, without values in its weights.

    Buffers become ones; so do tables that a network keeps as plain attributes (the angles of Qwen-Image's rotary
    embedding), which PyTorch's ``to_empty`` leaves on the meta device.
    """

    def table(value: Any) -> Any:
        if isinstance(value, list):
            return [table(one) for one in value]
        absent = isinstance(value, torch.Tensor) and value.is_meta
        return torch.ones_like(value, device=device) if absent else value

    network.to_empty(device=device)
    for buffer in network.buffers():
        buffer.fill_(1)
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor | list):
                setattr(module, name, table(value))
    return network


def _downloaded_configs(name: str) -> Path:
    """The folder of a hub model's configs, in the hub's cache on this machine."""
    from huggingface_hub import snapshot_download

    try:
        with asking_hub(name, cached=is_cached(name, "model_index.json")):
            return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"The configs of '{name}' cannot be downloaded: {short_error(error)}") from None


def _pipeline(name: str, folder: Path) -> MetaPipeline:
    index = _read(folder / "model_index.json")
    named = {part: kind for part, kind in index.items() if is_part(kind) and kind[-1]}
    found = {part: kind for part, kind in named.items() if (folder / part / "config.json").is_file()}
    if not found.keys() & set(registry.parts()):
        wanted = " or ".join(registry.parts())
        raise ValueError(f"{index.get('_class_name')} is not supported as a teacher: it has no {wanted}.")
    parts = {part: _network(folder / part, *kind) for part, kind in found.items()}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokens = _read(tokenizer).get("model_max_length", CLIP_TOKENS) if tokenizer.is_file() else CLIP_TOKENS
    config = _read(scheduler) if scheduler.is_file() else {}
    settings = {key: value for key, value in index.items() if not key.startswith("_") and not is_part(value)}
    tokens = min(int(tokens), CLIP_TOKENS)
    return MetaPipeline(name, str(index.get("_class_name")), parts, config, tokens, settings=settings)


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
    return network


def _read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise TypeError(f"{path} is no config")
    return data
