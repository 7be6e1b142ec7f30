"""Bytes of strangers become pixels, or a reason: formats, modes, sizes, damage."""

from __future__ import annotations

import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.images import CaptionedImage, pixels


def encoded(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def seen(data, size=(32, 32)):
    """[3, height, width] from 0 to 1."""
    return pixels(CaptionedImage("it", "a", "", lambda: data), lambda height, width: size).float() / 255


def halves(size, red, mode="RGB"):
    """Red up to a column, blue behind it."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, red, size[1]))
    return image.convert(mode)


def test_pictures_are_upright_cut_around_their_middle_and_of_the_wanted_size():
    """Red on the left, blue on the right: as a square that its camera says to turn, and twice as broad as high."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left half comes to the top
    turned, cut = seen(encoded(halves((60, 60), 30), exif=exif)), seen(encoded(halves((60, 30), 24)))
    assert turned.shape == (3, 32, 32) and (turned.min(), turned.max()) == (0, 1)
    assert (turned[0, :14] > 0.95).all() and (turned[2, 18:] > 0.95).all()
    # of the broad one the middle, from 15 to 45, is kept: red up to 24, which is 9 of 30
    assert (cut[0, :, :8] > 0.95).all() and (cut[2, :, 12:] > 0.95).all()
    broad = seen(encoded(halves((60, 30), 24)), size=(16, 48))  # rows go, columns stay
    assert broad.shape == (3, 16, 48)
    assert (broad[0, :, :17] > 0.95).all() and (broad[2, :, 22:] > 0.95).all()


def test_the_shape_that_decides_is_that_of_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    asked = []

    def size_for(height, width):
        asked.append((height, width))
        return 32, 16

    for how in ({}, {"exif": exif}):
        data = encoded(halves((60, 30), 24), **how)
        assert pixels(CaptionedImage("it", "a", "", lambda data=data: data), size_for).shape == (3, 32, 16)
    assert asked == [(30, 60), (60, 30)]


def test_grey_of_16_bits_keeps_its_steps():
    ramp = np.linspace(0, 65535, 32, dtype=np.uint16)[None].repeat(32, axis=0)
    shown = seen(encoded(Image.fromarray(ramp)))
    torch.testing.assert_close(shown[0, 0], torch.linspace(0, 1, 32), atol=0.004, rtol=0)
    assert torch.equal(shown[0], shown[1]) and torch.equal(shown[0], shown[2])


def test_what_is_transparent_is_white():
    image = halves((32, 32), 32).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((32, 32)).point(lambda a: 0 if a < 128 else 255))
    shown = seen(encoded(image))
    assert (shown[:, :12] == 1).all() and (shown[0, 20:] == 1).all() and (shown[1:, 20:] == 0).all()
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (seen(encoded(palette, transparency=0)) == 1).all()
    assert (seen(encoded(Image.new("LA", (32, 32), (0, 0)))) == 1).all()


@pytest.mark.parametrize(("kind", "how"), [("JPEG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PNG", {})])
def test_every_format_that_is_promised(kind, how):
    shown = seen(encoded(halves((64, 64), 32), kind, **how))
    assert (shown[0, :, :12] > 0.9).all() and (shown[2, :, 20:] > 0.9).all() and (shown[1] < 0.1).all()


def test_inks_become_colours():
    """A white CMYK page has no ink."""
    shown = seen(encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"))
    assert (shown[0] > 0.95).all() and (shown[1:] < 0.05).all()


def test_large_pictures_are_read_and_larger_ones_refused(monkeypatch):
    large = encoded(Image.new("1", (10_000, 2_000), 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000_000)  # of which Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (seen(large, size=(8, 32)) == 1).all()
    monkeypatch.undo()
    for data in (_claims(12_000, 12_000), _claims(40_000, 40_000)):
        with pytest.raises(ValueError, match=r"pixels are too many"):
            seen(data)


def _claims(width, height):
    """A PNG of a few bytes that says it is enormous."""
    data = bytearray(encoded(Image.new("L", (4, 4))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_what_cannot_be_used_is_said_in_a_few_words():
    whole = encoded(halves((64, 64), 32))
    gif = encoded(halves((64, 64), 32), "GIF")
    for data, says in (
        (whole[: len(whole) // 2], "it is damaged, or no image"),
        (whole[:20], "it is damaged, or no image"),
        (b"", "it is damaged, or no image"),
        (pickle.dumps(_Trap()), "it is damaged, or no image"),
        (gif, "it is damaged, or no image"),
        (encoded(Image.new("RGB", (1, 1))), "its 1 x 1 pixels are too few"),
        (encoded(Image.new("RGB", (500, 3))), "its 500 x 3 pixels are too few"),
    ):
        with pytest.raises(ValueError, match=f"^{says}$"):
            seen(data)

    def gone():
        raise FileNotFoundError

    with pytest.raises(ValueError, match=r"^it cannot be read$"):
        pixels(CaptionedImage("it", "a", "", gone), lambda height, width: (8, 8))
