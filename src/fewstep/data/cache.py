"""Pictures and captions, encoded once by the teacher's own VAE and text encoder, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.files import replace_tensors
from fewstep.data.scenes import Scenes
from fewstep.data.sources import LatentSource
from fewstep.models.cond import Cond
from fewstep.models.families import Teacher

_BATCH = 32
_NAMES = ("mean", "std", "prompt_embeds", "null_embeds")


def scene_latents(
    path: Path,
    teacher: Teacher,
    size: int,
    seed: int,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> LatentSource:
    """Scenes 0 ... size - 1 of set ``seed`` as latents with prompt embeddings, from ``path`` if it holds just these.

    Latents are kept as their posterior's mean and standard deviation, in float16, and sampled anew at every visit.
    ``advance`` is called with the number of pictures encoded.
    """
    wanted = {"source": f"scenes {seed} {size}", "teacher": teacher.origin}
    tensors = _read(path, wanted)
    if tensors is None:
        tensors = _encode(teacher, size, seed, advance or (lambda done: None))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(path, tensors, wanted)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    cond = Cond({"prompt_embeds": tensors["prompt_embeds"]}, null={"prompt_embeds": tensors["null_embeds"]})
    return LatentSource(tensors["mean"], tensors["std"], cond)


def fingerprint(source: LatentSource) -> str:
    """A short name of the data's exact content."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (source.mean, source.std):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _encode(teacher: Teacher, size: int, seed: int, advance: Callable[[int], None]) -> dict[str, Tensor]:
    scenes = Scenes(seed, size=teacher.image_size)
    means, stds, embeds = [], [], []
    for first in range(0, size, _BATCH):
        rendered = scenes.render(range(first, min(first + _BATCH, size)))
        images = torch.from_numpy(rendered.images).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, std = teacher.encode_images(images)
        means.append(mean.half().cpu())
        stds.append(std.half().cpu())
        embeds.append(teacher.encode_prompts(rendered.captions)["prompt_embeds"].half().cpu())
        advance(first + len(rendered.captions))
    null = teacher.encode_prompts([""])["prompt_embeds"].half().cpu()
    joined = {"mean": torch.cat(means), "std": torch.cat(stds), "prompt_embeds": torch.cat(embeds), "null_embeds": null}
    return {name: t.contiguous(memory_format=torch.contiguous_format) for name, t in joined.items()}


def _read(path: Path, wanted: dict[str, str]) -> dict[str, Tensor] | None:
    """The cached tensors, or None when there are none, or others, or the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != wanted:
                return None
            return {name: file.get_tensor(name) for name in _NAMES}
    except (OSError, SafetensorError):
        return None
