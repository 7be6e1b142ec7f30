"""Grids of images: one row for each model, with its label to the left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ON_PAGES = 256
"""Largest side of an image in the grid of a page."""
_SMALL = 192
_GAP, _INK, _PAPER = 4, (40, 40, 40), (250, 250, 250)


def image_grid(
    rows: Sequence[Tensor], labels: Sequence[str], captions: Sequence[str] = (), scale: int = 2, largest: int = 0
) -> Image.Image:
    """One row of images for each label.

    Args:
        rows: each [B, 3, H, W] in [0, 1], all of one shape.
        labels: one for each row; captions: one for each column, above it.
        scale: whole-number enlargement, pixels kept square. largest: side to which larger images are reduced; 0: never.
    """
    font = ImageFont.load_default(size=14)
    count, _, height, width = rows[0].shape
    height, width = height * scale, width * scale
    way, most = Image.Resampling.NEAREST, max(height, width)
    if 0 < largest < most:
        way, height, width = Image.Resampling.LANCZOS, height * largest // most, width * largest // most
    left = _GAP + max(int(font.getlength(label)) for label in labels) + 2 * _GAP
    wrapped = [_wrap(text, font, width) for text in captions]
    top = _GAP + 17 * max((len(lines) for lines in wrapped), default=0)
    size = (left + count * (width + _GAP), top + len(rows) * (height + _GAP))
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(wrapped):
        for i, line in enumerate(lines):
            draw.text((left + column * (width + _GAP), _GAP + 17 * i), line, _INK, font)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + i * (height + _GAP)
        draw.text((_GAP, y + height // 2 - 8), label, _INK, font)
        for j, image in enumerate(to_images(row)):
            canvas.paste(image.resize((width, height), way), (left + j * (width + _GAP), y))
    return canvas


def enlargement(images: Tensor) -> int:
    """How many times small images [B, 3, H, W] are enlarged where people look at them: to about 192 pixels."""
    return max(1, _SMALL // images.shape[-1])


def to_images(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [0, 1] -> PIL images."""
    values = (images.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
    return [Image.fromarray(value) for value in values]


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
