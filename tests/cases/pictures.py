"""Pictures of every kind as bytes, written by hand where Pillow cannot write them, and what they show."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = (24, 40)
"""(height, width)."""


def noise(*channels, top=256, seed=0):
    """[height, width, *channels] of whole numbers below ``top``, of which each appears about equally often."""
    return np.random.RandomState(seed).randint(0, top, (*SIZE, *channels))


def encoded(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def png16(values, key=None):
    """A PNG of 16 bits: [H, W] or [H, W, C], C of 2 (grey and alpha), 3 or 4; ``key``: the transparent colour."""
    height, width = values.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if key is not None:
        chunks.insert(1, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    body = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_of(values, bits, key):
    """A PNG of grey of ``bits`` (1, 2, 4) whose transparent colour is ``key``."""
    rows = ("".join(f"{value:0{bits}b}" for value in row) for row in values)  # SIZE fills whole bytes
    rows = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    head = struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"tRNS", struct.pack(">H", key)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff16(values, order="<", white_is_zero=False):
    """An uncompressed TIFF of 16 bits, [H, W] or [H, W, 3], in either byte order."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    data = values.astype(f"{order}u2").tobytes()
    first = 8 + len(data)
    tags = [(256, 3, 1, width), (257, 3, 1, height), (259, 3, 1, 1),
            (262, 3, 1, 1 - white_is_zero if channels == 1 else 2), (273, 4, 1, 8),
            (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    bits_at = first + 2 + 12 * (len(tags) + 1) + 4
    tags.append((258, 3, channels, 16 if channels == 1 else bits_at))
    entry = [
        struct.pack(f"{order}HHI", tag, kind, count)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value))
        for tag, kind, count, value in sorted(tags)
    ]
    ifd = struct.pack(f"{order}H", len(tags)) + b"".join(entry) + struct.pack(f"{order}I", 0)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    bits = struct.pack(f"{order}{channels}H", *[16] * channels) if channels > 1 else b""
    return mark + struct.pack(f"{order}I", first) + data + ifd + bits


def on_white(colour, alpha):
    """What a transparent colour from 0 to 255 looks like on white; ``alpha`` from 0 to 1."""
    alpha = np.asarray(alpha, dtype=np.float64)[..., None]
    return colour * alpha + 255 * (1 - alpha)


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.float64)[..., None], 3, -1)


def upright(values, orientation):
    """The stored pixels [H, W, C] as they are to be shown (EXIF 2.3, tag 0x0112), by index alone."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)  # now row 0 is what was stored as column 0
    down, right = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[
        orientation
    ]
    return values[::down, ::right]


def shown():
    """name -> (bytes, what it shows [H, W, 3] from 0 to 255, how many levels it may be off)."""
    a, wide, alpha = noise(3).astype(np.uint8), noise(3, top=65536), noise(seed=1).astype(np.uint8)
    flat, deep = noise(seed=2).astype(np.uint8), noise(top=65536, seed=3)
    image, other = Image.fromarray(a), Image.fromarray(255 - a)
    rgba = np.concatenate([a, alpha[..., None]], -1)
    palette = Image.fromarray(flat % 4, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    ink = noise(4, seed=4).astype(np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])[flat % 4]
    exif = Image.Exif()
    exif[0x0112] = 6
    floats = noise(top=1001, seed=5).astype(np.float32) / 1000
    key = tuple(int(v) for v in a[3, 5])
    keyed = a.astype(float)
    keyed[(a == key).all(-1)] = 255
    return {
        "rgb": (encoded(image), a, 0),
        "bmp": (encoded(image, "BMP"), a, 0),
        "webp": (encoded(image, "WEBP", lossless=True), a, 0),
        "tiff": (encoded(image, "TIFF"), a, 0),
        "tiff lzw": (encoded(image, "TIFF", compression="tiff_lzw"), a, 0),
        "grey": (encoded(Image.fromarray(flat)), grey(flat), 0),
        "one bit": (encoded(Image.fromarray(flat > 99)), grey(255 * (flat > 99)), 0),
        "palette": (encoded(palette), colours, 0),
        "palette, one transparent": (
            encoded(palette, transparency=2), np.where((flat % 4 == 2)[..., None], 255, colours), 0,
        ),
        "palette, alphas": (
            encoded(palette, transparency=bytes([0, 255, 51, 255])),
            on_white(colours, np.array([0, 1, 0.2, 1])[flat % 4]), 1,
        ),
        "rgba": (encoded(Image.fromarray(rgba)), on_white(a, alpha / 255), 1),
        "rgba webp": (encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), on_white(a, alpha / 255), 1),
        "rgba tiff": (encoded(Image.fromarray(rgba), "TIFF"), on_white(a, alpha / 255), 1),
        "la": (encoded(Image.fromarray(np.stack([flat, alpha], -1))), on_white(grey(flat), alpha / 255), 1),
        "rgb, one transparent": (encoded(image, transparency=key), keyed, 0),
        "grey of 16": (png16(deep), grey(deep / 257), 0.5),
        "grey of 16 tiff": (tiff16(deep), grey(deep / 257), 0.5),
        "grey of 16 tiff, white 0": (tiff16(deep, white_is_zero=True), 255 - grey(deep / 257), 0.5),
        "grey of 16 tiff, big end first": (tiff16(deep, ">"), grey(deep / 257), 0.5),
        "rgb of 16": (png16(wide), wide / 257, 1),
        "rgb of 16 tiff": (tiff16(wide), wide / 257, 1),
        "rgb of 16 tiff, big end first": (tiff16(wide, ">"), wide / 257, 1),
        "la of 16": (png16(noise(2, top=65536)), on_white(grey(noise(2, top=65536)[..., 0] / 257),
                                                           noise(2, top=65536)[..., 1] / 65535), 2),
        "rgba of 16": (png16(noise(4, top=65536)), on_white(noise(4, top=65536)[..., :3] / 257,
                                                             noise(4, top=65536)[..., 3] / 65535), 2),
        "floats": (encoded(Image.fromarray(floats), "TIFF"), grey(255 * floats.astype(np.float64)), 0.5),
        "inks": (
            encoded(Image.fromarray(ink, "CMYK"), "TIFF"),
            (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255, 1,
        ),
        "turned": (encoded(image, exif=exif), upright(a, 6), 0),
        "turned webp": (encoded(image, "WEBP", lossless=True, exif=exif), upright(a, 6), 0),
        "turned tiff": (encoded(image, "TIFF", tiffinfo={274: 6}), upright(a, 6), 0),
        "turned grey of 16": (encoded(Image.fromarray(deep.astype(np.uint16)), exif=exif), upright(grey(deep / 257), 6),
                              0.5),
        "moving": (encoded(image, save_all=True, append_images=[other]), a, 0),
        "moving webp": (encoded(image, "WEBP", save_all=True, append_images=[other], lossless=True), a, 0),
        "pages": (encoded(image, "TIFF", save_all=True, append_images=[other]), a, 0),
    }  # fmt: skip
