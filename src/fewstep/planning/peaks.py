"""What parts of a pipeline add to memory at their peak, outside training steps: traced on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.families import vae_batch_size
from fewstep.models.families.teacher import PROMPTS_AT_ONCE
from fewstep.models.meta_pipeline import MetaPipeline
from fewstep.models.precision import runs_without_autocast
from fewstep.planning.memory_trace import DeviceRules, MemoryTracker
from fewstep.training.settings import TrainingSettings


def tensors_of(network: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*network.parameters(), *network.buffers()]


@torch.no_grad()
def vae_peak(pipeline: MetaPipeline, images: int, device: str, decode: bool) -> int:
    """Bytes that the autoencoder adds while it encodes or decodes images; 0 where it has nothing to do."""
    vae: Any = pipeline.parts.get("vae")
    side = pipeline.image_size
    if vae is None or side is None or not images:
        return 0
    family, count = pipeline.family(), min(images, vae_batch_size(side))
    shape = pipeline.latent_shape if decode else (3, side, side)
    batch = torch.empty(count, *shape, dtype=vae.dtype, device="meta")
    batch = family.to_decoder(batch) if decode else family.to_encoder(batch)
    tracker = MemoryTracker(device, tensors_of(vae))
    with DeviceRules(device, None), tracker:
        vae.decode(batch, return_dict=False) if decode else vae.encode(batch)
    return tracker.peak


@torch.no_grad()
def guided_peak(pipeline: MetaPipeline, prompts: int, settings: TrainingSettings) -> int:
    """Bytes that the teacher's network adds while it generates a sample grid, with guidance; 0 without prompts."""
    if not prompts:
        return 0
    teacher = pipeline.denoiser()
    x = torch.empty(prompts, *pipeline.latent_shape, dtype=settings.dtype, device="meta")
    cond, device = pipeline.prompts(prompts, settings.dtype), torch.device(settings.device).type
    network: Any = teacher.network
    tracker = MemoryTracker(device, [*tensors_of(network), x, *cond.tensors.values()])
    dtype = None if runs_without_autocast(network, settings.autocast) else settings.autocast
    with DeviceRules(device, dtype), tracker:
        teacher(x, teacher.schedule.start, cond, 2.0)
    return tracker.peak


@torch.no_grad()
def text_peak(pipeline: MetaPipeline, captions: int, device: str) -> int:
    """Bytes that the largest text encoder adds while it encodes so many captions of one micro-batch."""
    encoders = [part for name, part in pipeline.parts.items() if name.startswith("text_encoder")]
    return max((_encoding_peak(part, pipeline, min(captions, PROMPTS_AT_ONCE), device) for part in encoders), default=0)


def _encoding_peak(part: nn.Module, pipeline: MetaPipeline, captions: int, device: str) -> int:
    config: Any = part.config
    most, tokens = getattr(config, "max_position_embeddings", None), pipeline.family().text_tokens
    ids = torch.zeros(captions, min(most or tokens, tokens), dtype=torch.int64, device="meta")
    tracker = MemoryTracker(device, [*tensors_of(part), ids])
    with DeviceRules(device, None), tracker:
        found = part(ids, output_hidden_states=most is not None)  # of which families take others than T5's last
    del found
    return tracker.peak
