"""Scenes as files, in the two layouts that training programs read: a folder of images, and webdataset shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fewstep.data.files import replace_text, replacing
from fewstep.scenes64.scenes.source import Scenes

_BATCH = 64


def write_image_folder(folder: Path, scenes: Scenes, count: int) -> None:
    """Scenes 0 ... count - 1 as ``<index>.png``, and ``metadata.jsonl`` with their captions.

    It is the layout of `datasets`' imagefolder: lines of ``{"file_name": ..., "text": ...}``, here with the scene's
    address too. The list is written last: a folder without it was not finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, png, line in _items(scenes, count):
        (folder / f"{name}.png").write_bytes(png)
        lines.append(json.dumps({"file_name": f"{name}.png", **line}))
    replace_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def write_webdataset(folder: Path, scenes: Scenes, count: int, shard_size: int = 1000) -> list[Path]:
    """Scenes 0 ... count - 1 in ``scenes-<number>.tar``, each as ``<index>.png``, ``.txt`` (caption) and ``.json``.

    The same call writes the same bytes. Each shard appears whole or not at all; returns their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    items = _items(scenes, count)
    for number, first in enumerate(range(0, count, shard_size)):
        path = folder / f"scenes-{number:06d}.tar"
        with replacing(path) as part, tarfile.open(part, "w") as tar:
            for _ in range(min(shard_size, count - first)):
                name, png, line = next(items)
                for suffix, content in (("png", png), ("txt", line["text"]), ("json", json.dumps(line))):
                    data = content if isinstance(content, bytes) else str(content).encode()
                    entry = tarfile.TarInfo(f"{name}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        shards.append(path)
    return shards


def _items(scenes: Scenes, count: int) -> Iterator[tuple[str, bytes, dict[str, str | int]]]:
    """(name, PNG, what is to be written beside it) of each scene."""
    for first in range(0, count, _BATCH):
        indices = range(first, min(first + _BATCH, count))
        rendered = scenes.render(indices)
        for index, image, caption in zip(indices, rendered.images, rendered.captions, strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            yield f"{index:08d}", file.getvalue(), {"text": caption, "seed": scenes.seed, "index": index}
