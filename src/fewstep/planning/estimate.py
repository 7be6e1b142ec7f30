"""What a run needs before it starts: memory by part, network calls and forward equivalents of a step, time.

Weights, moments and data are counted by their shapes; what a step adds is rehearsed on the meta device
(`fewstep.planning.memory_trace`), so a plan needs no weights and hardly any memory itself.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.cache import home
from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.sources import LatentSource, Source, WithPrompts
from fewstep.methods.base import Method
from fewstep.models.families import vae_batch_size
from fewstep.models.lora import lora_layers
from fewstep.models.meta_pipeline import MetaPipeline
from fewstep.models.quantize import Kind, saved_bytes
from fewstep.models.roles import Roles, Weights
from fewstep.planning.memory_trace import DeviceRules, MemoryTracker, mean_cost, rehearse, size_of
from fewstep.training.optimizers import moment_bytes
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import trained_by
from fewstep.training.trainer import Trainer, build_roles

_STEP = ("gradients", "activations")


@dataclass(frozen=True)
class Estimate:
    """Of one run on one device, in bytes unless said otherwise.

    Attributes:
        device: where it will run.
        training: what is there at the peak of a training step, by part; the sum is the peak.
        encoding, sampling: peaks while images are encoded and while sample grids are decoded (0: not known).
        parameters: of the teacher's network (a number).
        trainable: parameters by player.
        lora_layers: how many layers the student adapts; 0 for full weights.
        calls: network calls of a step by role.
        equivalents: forward equivalents of a step per image (forward 1, backward 2), in the mean over its players.
    """

    device: str
    training: dict[str, int]
    encoding: int
    sampling: int
    parameters: int
    trainable: dict[str, int]
    lora_layers: int
    calls: Mapping[str, float]
    equivalents: float

    @property
    def step(self) -> int:
        """What a step holds beyond what is there between steps."""
        return sum(self.training[name] for name in _STEP)

    @property
    def peak(self) -> int:
        """The most memory that the run holds at any time."""
        return max(sum(self.training.values()), self.encoding, self.sampling)


def estimate(
    outline: MetaPipeline,
    method: type[Method],
    method_settings: Any,
    settings: TrainingSettings,
    weights: Weights,
    images: int,
    prompts: int = 0,
    pairs: int = 0,
    quantization: Kind | None = None,
) -> Estimate:
    """The estimate of distilling ``outline`` on ``images`` cached images, with grids of ``prompts`` prompts.

    Args:
        pairs: of the teacher, where the method learns from them. quantization: of its network.

    Raises:
        ValueError: a teacher that fewstep cannot distil yet; settings that the method or the network refuses.
    """
    device = torch.device(settings.device).type
    taught, roles, source, kept = _on_meta(outline, method, method_settings, settings, weights, images, pairs)
    players = {player.name: trained_by(player, roles) for player in taught.players}
    trained = [p for parameters in players.values() for p in parameters]
    peak, gradients = rehearse(taught, roles, source, settings), _size(trained, device)
    seen_through = [t for network in roles.helpers.networks[1:] for t in _tensors(network)]  # encoder, rewards
    vae, texts, others = (_parts(outline, kind, device) for kind in ("vae", "text_encoder", ""))
    less = 0 if quantization is None else saved_bytes(outline.base, quantization)
    waits = device != "cpu" and not roles.helpers.look  # the autoencoder on the host
    there = {
        "the teacher's network": _size(_tensors(outline.base), device) - less,
        "autoencoder": (0 if waits else vae) + others + _size(seen_through, device),
        "encoded data": _size([t for part in kept for t in _on_device(part, device)], device),
        **{_name_of(role, taught): size for role, size in _own(roles, device).items()},
        "optimiser": moment_bytes(trained, settings.optimizer),
    }
    between = sum(there.values())
    encoding = between - there["optimiser"] + texts + (vae if waits else 0)
    return Estimate(
        device=settings.device,
        training={**there, "gradients": gradients, "activations": max(peak - gradients, 0)},
        encoding=_encoding(outline, encoding, images, device),
        sampling=_sampling(outline, between + (vae if waits else 0), prompts, device),
        parameters=sum(p.numel() for p in outline.base.parameters()),
        trainable={name: sum(p.numel() for p in tensors) for name, tensors in players.items()},
        lora_layers=len(lora_layers(roles.base)),
        calls=taught.calls_per_step(),
        equivalents=mean_cost(taught, roles, source, settings),
    )


def step_cost(
    outline: MetaPipeline, method: type[Method], method_settings: Any, settings: TrainingSettings, weights: Weights
) -> float:
    """`Estimate.equivalents` alone, which takes less time to find."""
    taught, roles, source, _ = _on_meta(outline, method, method_settings, settings, weights, 1, 1)
    return mean_cost(taught, roles, source, settings)


def _parts(outline: MetaPipeline, kind: str, device: str) -> int:
    """Bytes of the parts beside the base: "vae", "text_encoder" and its like, or "" for all others."""
    rest = {name: part for name, part in outline.parts.items() if part is not outline.base}
    kinds = {name: next((k for k in ("vae", "text_encoder") if name.startswith(k)), "") for name in rest}
    return sum(_size(_tensors(part), device) for name, part in rest.items() if kinds[name] == kind)


def _on_meta(
    outline: MetaPipeline, method: type[Method], method_settings: Any, settings: TrainingSettings, weights: Weights,
    images: int, pairs: int,
) -> tuple[Method, Roles, Source, list[LatentSource]]:  # fmt: skip
    """Method, roles and data of a run without values, and the sets behind the data."""
    teacher = outline.denoiser()
    taught = method(teacher.schedule, method_settings)
    source, kept = _data(outline, method, images, pairs)
    precision = "fp32" if settings.autocast else settings.precision  # meta has no autocast; the rehearsal imitates it
    on_meta = dataclasses.replace(settings, device="meta", precision=precision)
    rewards = (*taught.rewards, *taught.measures)
    helpers = outline.helpers(taught.encoder, settings.gradient_checkpointing, rewards=rewards)
    with torch.device("meta"):  # new layers too
        roles = build_roles(teacher, taught, on_meta, weights, helpers=helpers)
    return taught, roles, source, kept


def _name_of(role: str, method: Method) -> str:
    spec = next((spec for spec in method.roles() if spec.name == role), None)
    if spec is not None and spec.decay == 1:
        return f"{role} (kept as it is)"
    trails = role == "ema" or (spec is not None and spec.follows is not None)
    return f"{role} (moving average)" if trails else f"{role}'s own weights"


def _own(roles: Roles, device: str) -> dict[str, int]:
    """Bytes of every role's own tensors."""
    sizes: dict[str, int] = {}
    for name, tensor in roles.tensors().items():
        role = name.partition("/")[0]
        sizes[role] = sizes.get(role, 0) + size_of(tensor, device)
    return sizes


def _data(
    outline: MetaPipeline, method: type[Method], images: int, pairs: int, device: str = "meta"
) -> tuple[Source, list[LatentSource]]:
    """What a method trains on, and the sets behind it."""
    data = _latents(outline, images, device)
    read: Source = WithPrompts(data, ["an image"] * images) if "prompts" in method.streams else data
    if "pairs" not in method.streams:
        return read, [data]
    like = _latents(outline, max(pairs, 1), device)
    made = PairSource(like.mean, like.cond, seed=0)
    return WithPairs(read, made), [data, made]


def _latents(outline: MetaPipeline, images: int, device: str = "meta") -> LatentSource:
    """A data set as `fewstep.data.cache` keeps it encoded, in float16, without its values."""
    cond = outline.prompts(images, torch.float16, device)
    mean, std = (torch.zeros(images, *outline.latent_shape, dtype=torch.float16, device=device) for _ in range(2))
    return LatentSource(mean, std, cond)


def _on_device(source: LatentSource, device: str) -> list[Tensor]:
    """The tensors of a data set that the device holds; of a large one none, but the teacher's samples always."""
    tensors = [source.mean, source.std, *_values(source)]
    here = isinstance(source, PairSource) or home(device, sum(t.nbytes for t in tensors)) == device
    return tensors if here else []


def _values(source: LatentSource) -> list[Tensor]:
    return [] if source.cond is None else list(source.cond.tensors.values())


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _size(tensors: Iterable[Tensor], device: str) -> int:
    return sum(size_of(t, device) for t in tensors)


@torch.no_grad()
def _encoding(outline: MetaPipeline, between: int, images: int, device: str) -> int:
    """Peak while the autoencoder encodes, batch after batch; the optimiser's moments are not there yet."""
    vae: Any = outline.parts.get("vae")
    if vae is None or outline.image_size is None:
        return 0
    ledger = MemoryTracker(device, _tensors(vae))
    side = outline.image_size
    with DeviceRules(device, None), ledger:
        vae.encode(torch.empty(min(images, vae_batch_size(side)), 3, side, side, dtype=vae.dtype, device="meta"))
    return between + ledger.peak


@torch.no_grad()
def _sampling(outline: MetaPipeline, between: int, prompts: int, device: str) -> int:
    """Peak while a sample grid's images are decoded."""
    vae: Any = outline.parts.get("vae")
    if vae is None or outline.image_size is None or not prompts:
        return 0
    count = min(prompts, vae_batch_size(outline.image_size))
    ledger = MemoryTracker(device, _tensors(vae))
    with DeviceRules(device, None), ledger:
        vae.decode(torch.empty(count, *outline.latent_shape, dtype=vae.dtype, device="meta"), return_dict=False)
    return between + ledger.peak


def seconds_of_step(
    outline: MetaPipeline, method: type[Method], method_settings: Any, settings: TrainingSettings, weights: Weights
) -> float:
    """Seconds of one training step, tried on the recipe's device with made-up weights and data.

    The mean of a few steps after one that warms up: as many as make every player update.
    """
    teacher = outline.denoiser()
    fill(teacher.network.to_empty(device=settings.device))  # type: ignore[attr-defined]
    taught = method(teacher.schedule, method_settings)
    rewards = (*taught.rewards, *taught.measures)
    sees = bool(taught.encoder or rewards)
    vae = copy.deepcopy(outline.parts["vae"]).to_empty(device=settings.device) if sees else None
    if vae is not None:
        fill(vae)
    helpers = outline.helpers(taught.encoder, settings.gradient_checkpointing, vae, rewards)
    roles = build_roles(teacher, taught, settings, weights, helpers=helpers)
    source, _ = _data(outline, method, settings.batch_size, settings.batch_size, settings.device)
    trainer = Trainer(taught, roles, source, settings)
    taken = []
    for step in range(1 + max(2, math.lcm(*(player.every for player in taught.players)))):
        start = time.perf_counter()
        trainer.step(step)
        trainer.players[0].grad_norm.item()
        taken.append(time.perf_counter() - start)
    return sum(taken[1:]) / len(taken[1:])


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Small random weights where there were none: the time of a call does not depend on them."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.01)
