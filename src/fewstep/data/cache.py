"""Pictures and captions, encoded once by the teacher's own VAE and text encoders, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.files import replace_tensors
from fewstep.data.folder import Picture, fingerprint_of, read_pictures
from fewstep.data.scenes import Scenes
from fewstep.data.sources import LatentSource
from fewstep.models.cond import Cond
from fewstep.models.families import Teacher

_BATCH = 32
_LARGEST = 2**31  # bytes that may stay on an accelerator; a batch of any size is fetched in a millisecond

Batches = Callable[[range], tuple[Tensor, Sequence[str]]]
"""Pictures [B, 3, H, W] in [-1, 1] and captions of these rows."""


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
    scenes = Scenes(seed, size=teacher.image_size)

    def batch(rows: range) -> tuple[Tensor, Sequence[str]]:
        rendered = scenes.render(rows)
        return torch.from_numpy(rendered.images).permute(0, 3, 1, 2).float() / 127.5 - 1, rendered.captions

    return _latents(path, teacher, f"scenes {seed} {size}", size, batch, device, advance)


def folder_latents(
    path: Path,
    teacher: Teacher,
    pictures: Sequence[Picture],
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> LatentSource:
    """These pictures likewise; encoded again where any of them, or its caption, has changed.

    Raises:
        ValueError: one sentence for a file that is no picture.
    """

    def batch(rows: range) -> tuple[Tensor, Sequence[str]]:
        some = pictures[rows.start : rows.stop]
        return read_pictures(some, teacher.image_size), [picture.caption for picture in some]

    name = f"folder {fingerprint_of(pictures)}"
    return _latents(path, teacher, name, len(pictures), batch, device, advance)


def home(device: str, size: int) -> str:
    """Where ``size`` bytes of encoded data are kept: ``device``, or the host where they would take too much of it.

    T5's embeddings are megabytes a caption: 4,000 pictures for FLUX are 21 GB.
    """
    return device if size <= _LARGEST else "cpu"


def fingerprint(source: LatentSource) -> str:
    """A short name of the data's exact content."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (source.mean, source.std):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _latents(
    path: Path,
    teacher: Teacher,
    name: str,
    size: int,
    batch: Batches,
    device: str,
    advance: Callable[[int], None] | None,
) -> LatentSource:
    wanted = {"source": name, "teacher": teacher.origin, "image_size": str(teacher.image_size)}
    tensors = _read(path, wanted)
    if tensors is None:
        tensors = _encode(teacher, size, batch, advance or (lambda done: None))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(path, tensors, wanted)
    place = home(device, sum(t.nbytes for t in tensors.values()))
    tensors = {name: t.to(place) for name, t in tensors.items()}
    return LatentSource(tensors["mean"], tensors["std"], Cond.from_flat(tensors))


def _encode(teacher: Teacher, size: int, batch: Batches, advance: Callable[[int], None]) -> dict[str, Tensor]:
    means, stds, conds = [], [], []
    for first in range(0, size, _BATCH):
        images, captions = batch(range(first, min(first + _BATCH, size)))
        mean, std = teacher.encode_images(images)
        means.append(mean.half().cpu())
        stds.append(std.half().cpu())
        conds.append(teacher.encode_prompts(captions).to(torch.float16).to("cpu"))
        advance(first + len(captions))
    joined = {"mean": torch.cat(means), "std": torch.cat(stds), **Cond.cat(conds).flat()}
    return {name: t.contiguous(memory_format=torch.contiguous_format) for name, t in joined.items()}


def _read(path: Path, wanted: dict[str, str]) -> dict[str, Tensor] | None:
    """The cached tensors, or None when there are none, or others, or the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != wanted:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
