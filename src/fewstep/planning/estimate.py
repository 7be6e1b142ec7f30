"""What a run will need: memory by part, network calls and forward passes of a step, time.

Weights, moments and data are counted by their shapes; what a step adds is traced on the meta device
(`fewstep.planning.rehearsal`), so an estimate needs no weights and hardly any memory itself.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.rows import HELD, Held
from fewstep.data.sources import LatentSource, Source, WithPrompts
from fewstep.methods.base import Method
from fewstep.models.compiled import repeated_blocks
from fewstep.models.lora import lora_layers
from fewstep.models.meta_pipeline import MetaPipeline, allocate
from fewstep.models.offload import offload
from fewstep.models.precision import refresh
from fewstep.models.quantize import Kind, saved_by_layer, saved_bytes
from fewstep.models.roles import Roles, Weights
from fewstep.planning.hardware import CONTEXT, FRAGMENTATION
from fewstep.planning.memory_trace import size_of
from fewstep.planning.peaks import guided_peak, tensors_of, text_peak, vae_peak
from fewstep.planning.rehearsal import Rehearsal, rehearse
from fewstep.planning.validating import Measuring, held_between, peak_beyond
from fewstep.training import distributed
from fewstep.training.optimizers import moment_bytes
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import trained_by
from fewstep.training.trainer import Trainer, build_roles, seconds_per_step

_STEP = ("gradients", "activations")
_CONTEXT = "CUDA context (assumed)"


@dataclass(frozen=True)
class Estimate:
    """What one run needs on one device.

    Attributes:
        device: where it will run.
        training: bytes at the peak of a training step, by part; their sum is the peak.
        encoding, sampling: peak bytes while images are encoded and while sample grids are decoded (0: not known).
        validating: peak bytes while the student is measured; 0 without validation.
        encoding_batch: peak bytes while captions, or images of a stream, are encoded for a step; 0 where none are.
        parameters: how many the teacher's network has.
        trainable: how many each player trains.
        lora_layers: how many layers the student adapts; 0 for full weights.
        calls: network calls of a step by role.
        rehearsal: the step's cost and operations.
        host: bytes in pinned memory of the host: weights of blocks that are brought to the device.
        checkpoint: bytes in the host's memory, of all processes together: the copy from which a checkpoint is written
            while training goes on.
    """

    device: str
    training: dict[str, int]
    encoding: int
    sampling: int
    validating: int
    encoding_batch: int
    parameters: int
    trainable: dict[str, int]
    lora_layers: int
    calls: Mapping[str, float]
    rehearsal: Rehearsal
    host: int = 0
    checkpoint: int = 0

    @property
    def equivalents(self) -> float:
        """Compute cost of a step per image in forward passes."""
        return self.rehearsal.equivalents

    @property
    def step(self) -> int:
        """Bytes that a step holds beyond those held between steps."""
        return sum(self.training[name] for name in _STEP)

    @property
    def peak(self) -> int:
        """The most bytes that the run holds at any time."""
        return max(sum(self.training.values()), self.encoding, self.sampling, self.validating, self.encoding_batch)


def estimate(
    pipeline: MetaPipeline,
    method: type[Method],
    method_settings: Any,
    settings: TrainingSettings,
    weights: Weights,
    images: int,
    prompts: int = 0,
    pairs: int = 0,
    quantization: Kind | None = None,
    step: Rehearsal | None = None,
    memory_alone: bool = False,
    measuring: Measuring | None = None,
    live: bool = False,
    stream: bool = False,
) -> Estimate:
    """The estimate of distilling ``pipeline`` on ``images`` cached images, with sample grids of ``prompts`` prompts.

    Args:
        method: its class, and method_settings: an instance of its `Settings`.
        pairs: samples of the teacher, where the method learns from them. quantization: of the teacher's network.
        step: what a rehearsal of this step found, if there was one. memory_alone: as in `rehearse`.
        measuring: validation during training, if there is any.
        live: captions are encoded in every step. stream: so are images, and none are kept.

    Raises:
        ValueError: a teacher that fewstep cannot distil; settings that the method or the network refuses.
    """
    device = torch.device(settings.device).type
    built, roles, source, kept = _on_meta(pipeline, method, method_settings, settings, weights, images, pairs)
    players = {player.name: trained_by(player, roles) for player in built.players}
    trained = [p for parameters in players.values() for p in parameters]
    step, gradients = step or rehearse(built, roles, source, settings, memory_alone), _size(trained, device)
    # whether the VAE stays on the host during training
    vae_waits = device != "cpu" and not (roles.helpers.look or stream)
    encoded = [t for part in kept for t in _on_device(part, device, live) if not stream]
    held, on_host = _teacher(pipeline, roles, settings, quantization, live, vae_waits)
    held |= {"encoded data": _size(encoded, device), **_students(built, roles, trained, settings)}
    vae, texts = _parts(pipeline, "vae", device), _parts(pipeline, "text_encoder", device)
    texts -= held.get("text encoders", 0)  # what is freed once all captions are encoded
    activations = max(step.peak - gradients, 0)
    assumed = _assumed(gradients + activations) if device == "cuda" else {}
    if measuring is not None:
        held["validation"] = held_between(measuring, pipeline, device)
    between = sum(held.values()) + assumed.get(_CONTEXT, 0)
    waiting = vae if vae_waits else 0
    rows = settings.batch_size // settings.accumulation // distributed.count()  # of a micro-batch
    encoding = vae_peak(pipeline, rows if stream else images, device, decode=False)  # runs before the optimiser exists
    sampling = vae_peak(pipeline, prompts, device, decode=True)
    if not memory_alone:
        sampling = max(sampling, guided_peak(pipeline, prompts, settings))
    measured = 0
    if measuring is not None and not memory_alone:
        decoding = waiting + vae_peak(pipeline, measuring.count, device, decode=True)
        measured = peak_beyond(measuring, pipeline, roles, device, decoding)
    encoding_batch = max(text_peak(pipeline, rows, device), encoding if stream else 0) if live else 0
    return Estimate(
        device=settings.device,
        training={**held, "gradients": gradients, "activations": activations, **assumed},
        encoding=0 if stream else encoding and between - held["optimiser"] + texts + waiting + encoding,
        sampling=sampling and between + waiting + sampling,
        validating=measured and between + measured,
        encoding_batch=encoding_batch and between + gradients + encoding_batch,
        parameters=sum(p.numel() for p in pipeline.base.parameters()),
        trainable={name: sum(p.numel() for p in tensors) for name, tensors in players.items()},
        lora_layers=len(lora_layers(roles.base)),
        calls=built.calls_per_step(),
        rehearsal=step,
        host=on_host,
        checkpoint=_checkpoint_copy(roles, trained, settings),
    )


def _teacher(
    pipeline: MetaPipeline, roles: Roles, settings: TrainingSettings, quantization: Kind | None, live: bool,
    vae_waits: bool,
) -> tuple[dict[str, int], int]:  # fmt: skip
    """Bytes of the teacher's parts on the device while the student is trained, and of those on the host."""
    device = torch.device(settings.device).type
    less = 0 if quantization is None else saved_bytes(pipeline.base, quantization)
    blocks, two = _blocks(pipeline.base, quantization, device) if settings.offload else (0, 0)
    on_host = 0 if device == "cpu" else blocks
    of_losses = [t for network in roles.helpers.networks[1:] for t in tensors_of(network)]  # image encoder, rewards
    vae, others = (_parts(pipeline, kind, device) for kind in ("vae", ""))
    held = {
        "the teacher's network": _size(tensors_of(pipeline.base), device) - less - on_host,
        **({"two blocks of it at a time": two} if two else {}),
        "autoencoder": (0 if vae_waits else vae) + others + _size(of_losses, device),
        **({"text encoders": _parts(pipeline, "text_encoder", device)} if live else {}),
    }
    return held, on_host


def _students(built: Method, roles: Roles, trained: Sequence[Tensor], settings: TrainingSettings) -> dict[str, int]:
    """Bytes of what training adds on the device: the roles' own weights, their copies and their moments."""
    device = torch.device(settings.device).type
    refresh(roles.shadows())
    copies = _size([t for shadow in roles.shadows() if (t := shadow.tensor) is not None], device)
    return {
        **{_name_of(role, built): size for role, size in _own(roles, device).items()},
        **({"bf16 copies of trained weights": copies} if copies else {}),
        "optimiser": moment_bytes(trained, settings.optimizer),
    }


def _assumed(step: int) -> dict[str, int]:
    """Bytes that CUDA takes beyond the tensors, where a step has ``step`` bytes of them."""
    return {_CONTEXT: CONTEXT, "fragmentation (assumed)": int(FRAGMENTATION * step)}


def step_cost(
    pipeline: MetaPipeline, method: type[Method], method_settings: Any, settings: TrainingSettings, weights: Weights
) -> float:
    """Compute cost of a step per image in forward passes, as `Rehearsal.equivalents`."""
    built, roles, source, _ = _on_meta(pipeline, method, method_settings, settings, weights, 1, 1)
    return rehearse(built, roles, source, settings).equivalents


def _blocks(network: nn.Module, quantization: Kind | None, device: str) -> tuple[int, int]:
    """Bytes of the weights that `fewstep.models.offload` keeps on the host, and of the two blocks in a row that are
    largest."""
    saved = {} if quantization is None else saved_by_layer(network, quantization)
    sizes = [
        _size(block.parameters(), device) - sum(saved.get(layer, 0) for layer in block.modules())
        for block in repeated_blocks(network)
    ]
    return sum(sizes), max((a + b for a, b in itertools.pairwise(sizes)), default=sum(sizes))


def _parts(pipeline: MetaPipeline, kind: str, device: str) -> int:
    """Bytes of the parts beside the base: "vae", "text_encoder" and its like, or "" for all others."""
    rest = {name: part for name, part in pipeline.parts.items() if part is not pipeline.base}
    kinds = {name: next((k for k in ("vae", "text_encoder") if name.startswith(k)), "") for name in rest}
    return sum(_size(tensors_of(part), device) for name, part in rest.items() if kinds[name] == kind)


def _on_meta(
    pipeline: MetaPipeline, method: type[Method], method_settings: Any, settings: TrainingSettings, weights: Weights,
    images: int, pairs: int,
) -> tuple[Method, Roles, Source, list[LatentSource]]:  # fmt: skip
    """Method, roles and data of a run without values, and the data sets behind its source."""
    teacher = pipeline.denoiser()
    network: Any = teacher.network
    if settings.offload:  # whose blocks are checkpointed
        offload(network, "meta")
    built = method(teacher.schedule, method_settings)
    source, kept = _data(pipeline, built.streams, images, pairs)
    on_meta = dataclasses.replace(settings, device="meta", compile=False)
    rewards = (*built.rewards, *built.measures)
    helpers = pipeline.helpers(built.encoder, settings.gradient_checkpointing, rewards=rewards)
    with torch.device("meta"):  # so that added layers are created there too
        roles = build_roles(teacher, built, on_meta, weights, helpers=helpers)
    return built, roles, source, kept


def _checkpoint_copy(roles: Roles, trained: Sequence[Tensor], settings: TrainingSettings) -> int:
    """Bytes of the sharded tensors of a checkpoint: full weights, and their moments. LoRAs and heads stay whole."""
    if not (settings.fsdp and settings.async_checkpoints):
        return 0
    kept_whole = (".lora_", "/extras.", "/bank.")
    rows = [
        tensor
        for name, tensor in roles.tensors().items()
        if name.partition("/")[0] not in roles.heads and not any(part in name for part in kept_whole)
    ]
    learn = {id(parameter) for parameter in trained}
    return _size(rows, "cpu") + moment_bytes([t for t in rows if id(t) in learn], settings.optimizer)


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
    pipeline: MetaPipeline, streams: Collection[str], images: int, pairs: int, device: str = "meta"
) -> tuple[Source, list[LatentSource]]:
    """The source of a method that reads these streams, and the data sets behind it."""
    data = _latents(pipeline, images, device)
    read: Source = WithPrompts(data, ["an image"] * images) if "prompts" in streams else data
    if "pairs" not in streams:
        return read, [data]
    like = _latents(pipeline, max(pairs, 1), device)
    made = PairSource(like.mean, like.cond, seed=0)
    return WithPairs(read, made), [data, made]


def _latents(pipeline: MetaPipeline, images: int, device: str = "meta") -> LatentSource:
    """A data set as `fewstep.data.cache` keeps it encoded, in float16, without its values."""
    cond = pipeline.prompts(images, pipeline.family().text_dtype, device)
    mean, std = (torch.zeros(images, *pipeline.latent_shape, dtype=torch.float16, device=device) for _ in range(2))
    return LatentSource(mean, std, cond)


def _on_device(source: LatentSource, device: str, live: bool) -> list[Tensor]:
    """The tensors of a data set that the device holds: the host those of a small one, which is read once.

    Args:
        live: captions are kept as text, which takes next to nothing.
    """
    rows = source.rows
    assert isinstance(rows, Held)
    found = [t for name, t in rows.tensors.items() if not (live and name.startswith("cond."))]
    return found if device == "cpu" and sum(t.nbytes for t in found) <= HELD else []


def _size(tensors: Iterable[Tensor], device: str) -> int:
    return sum(size_of(t, device) for t in tensors)


def seconds_of_step(
    pipeline: MetaPipeline, method: type[Method], method_settings: Any, settings: TrainingSettings, weights: Weights
) -> float:
    """Seconds of one training step, tried on the recipe's device with random weights and data of zeros.

    The mean of a few steps after one that warms up: as many as make every player update.
    """
    return seconds_per_step(*filled_trainer(pipeline, method, method_settings, settings, weights), warm_up=1)


def filled_trainer(
    pipeline: MetaPipeline, method: type[Method], method_settings: Any, settings: TrainingSettings, weights: Weights
) -> tuple[Trainer, int]:
    """A trainer with random weights on data of zeros, and how many of its steps make every player update."""
    teacher = pipeline.denoiser()
    network: Any = teacher.network
    fill(allocate(network, "cpu" if settings.offload else settings.device))
    if settings.offload:
        offload(network, settings.device)
    built = method(teacher.schedule, method_settings)
    rewards = (*built.rewards, *built.measures)
    vae = None
    if built.encoder or rewards:
        vae = allocate(copy.deepcopy(pipeline.parts["vae"]), settings.device)
        fill(vae)
    helpers = pipeline.helpers(built.encoder, settings.gradient_checkpointing, vae, rewards)
    roles = build_roles(teacher, built, settings, weights, helpers=helpers)
    source, _ = _data(pipeline, built.streams, settings.batch_size, settings.batch_size, settings.device)
    built.players = tuple(dataclasses.replace(player, start=0) for player in built.players)
    steps = max(2, math.lcm(*(player.every for player in built.players)))
    return Trainer(built, roles, source, settings), steps


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Give ``network`` small random weights: the time of a call does not depend on them."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.01)
