"""Pictures as people have them: the same pixels for training and for sampling, from whatever form they come in.

What each shows is computed from the numbers that were written, in float64, not by the code under test.
"""

from __future__ import annotations

import io
import os
import signal
import socket

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fewstep.data.images import CaptionedImage, pixels
from fewstep.inference.images import as_images, as_list, as_masks, opened
from tests.cases.pictures import SIZE, encoded, grey, noise, png16, png_of, shown, upright

PICTURES = shown()


def trained(data, size):
    """[H, W, 3] from 0 to 255, as the data set reads it."""
    return pixels(CaptionedImage("it", "a", "", lambda: data), lambda height, width: size).permute(1, 2, 0).numpy()


def sampled(given, size=SIZE):
    """Likewise, as image-to-image reads it."""
    return ((as_images(given, size) + 1) * 127.5).round()[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_from_whatever_it_comes(name, tmp_path):
    data, expected, levels = PICTURES[name]
    size = expected.shape[:2]
    (tmp_path / "a.img").write_bytes(data)
    whole = Image.open(io.BytesIO(data))
    whole.load()
    with open(tmp_path / "a.img", "rb") as file:
        forms = {
            "path": tmp_path / "a.img", "text": str(tmp_path / "a.img"), "bytes": data, "bytearray": bytearray(data),
            "memory": memoryview(data), "stream": io.BytesIO(data), "file": file,
            "PIL": Image.open(io.BytesIO(data)), "PIL, read": whole,
        }  # fmt: skip
        found = {form: sampled(given, size) for form, given in forms.items()} | {"training": trained(data, size)}
    for form, image in found.items():
        assert image.shape == expected.shape and np.abs(image - expected).max() <= levels + 1e-9, form
        assert (image == found["training"]).all(), form
    assert len(as_images(np.stack([noise(3), noise(3)]).astype(np.uint8), size)) == 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation):
    values = noise(3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = upright(values, orientation)
    data = encoded(Image.fromarray(values), exif=exif)
    assert (trained(data, expected.shape[:2]) == expected).all()
    assert (sampled(Image.open(io.BytesIO(data)), expected.shape[:2]) == expected).all()
    assert (sampled(opened(opened(data)), expected.shape[:2]) == expected).all()  # turned once
    mask = encoded(Image.fromarray(values[..., 0]), exif=exif)
    found = as_masks(Image.open(io.BytesIO(mask)), data, expected.shape[:2])
    assert (found[0, 0].numpy() == (expected[..., 0] >= 128)).all()


def test_the_shape_that_decides_is_that_of_the_upright_picture():
    """Whatever says how it lies: Pillow turns a TIFF by itself, others not."""
    asked = []

    def size_for(height, width):
        asked.append((height, width))
        return SIZE[::-1]

    for name in ("turned", "turned webp", "turned tiff"):
        pixels(CaptionedImage("it", "a", "", lambda name=name: PICTURES[name][0]), size_for)
    assert asked == [SIZE[::-1]] * 3


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0no TIFF at all", b"x"])
def test_damaged_exif_leaves_the_picture(exif):
    values = noise(3).astype(np.uint8)
    data = encoded(Image.fromarray(values), exif=exif)
    assert (trained(data, SIZE) == values).all() and (sampled(data) == values).all()


def test_an_orientation_that_does_not_exist_is_upright():
    values = noise(3).astype(np.uint8)
    for said in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = said
        assert (trained(encoded(Image.fromarray(values), exif=exif), SIZE) == values).all()


def test_what_png_names_as_transparent_is_white_in_16_bits_too():
    deep, wide = noise(top=60000), noise(3, top=60000)
    deep[2, 3], wide[2, 3] = 60000, (60000, 1000, 60001)
    for values, key in ((deep, [60000]), (wide, [60000, 1000, 60001])):
        data = png16(values, key)
        for image in (trained(data, SIZE), sampled(data), sampled(Image.open(io.BytesIO(data)))):
            assert (image[2, 3] == 255).all()
            image[2, 3] = values[2, 3] / 257
            assert np.abs(image - (values if values.ndim == 3 else grey(values)) / 257).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_png_names_as_transparent_is_white_in_few_bits_too(bits):
    """Pillow scales the pixels to 8 bits, but not the colour that is transparent."""
    values, top = noise(top=2**bits), 2**bits - 1
    for key in range(top + 1):
        data, expected = png_of(values, bits, key), grey(np.where(values == key, 255, values * 255 // top))
        picture = Image.open(io.BytesIO(data))
        for image in (trained(data, SIZE), sampled(data), sampled(picture), sampled(picture)):
            assert (image == expected).all()


@pytest.mark.parametrize("size", [(24, 24), (64, 64), (32, 48), (12, 40)])
def test_pictures_of_other_sizes_are_cut_and_resized_alike(size):
    """And as `ImageOps.fit` does it, to the bit: images that were sampled before stay what they were.

    Up to six times the wanted size: beyond it, for training alone, Pillow averages pixels first.
    """
    for shape in (SIZE, (67, 101), (30, 90)):
        image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (*shape, 3)).astype(np.uint8))
        before = np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS))
        assert (sampled(image, size) == before).all() and (trained(encoded(image), size) == before).all()


def test_a_very_wide_picture_is_its_middle():
    image = Image.new("RGB", (20_000, 8), "red")
    image.paste("blue", (9_996, 0, 10_004, 8))
    assert (sampled(image, (8, 8)) == [0, 0, 255]).all() and (trained(encoded(image), (8, 8)) == [0, 0, 255]).all()


def test_colour_profiles_are_not_applied():
    """Values are taken as sRGB, whatever profile is beside them: as documented, and as earlier versions did."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    values = noise(3).astype(np.uint8)
    for junk in (profile, b"no profile"):
        data = encoded(Image.fromarray(values), icc_profile=junk)
        assert (trained(data, SIZE) == values).all() and (sampled(data) == values).all()


# ---------------------------------------------------------------- arrays and tensors

EIGHT, DEEP = noise(3).astype(np.uint8), noise(3, top=65536).astype(np.uint16)
UNIT = (DEEP / 65535).astype(np.float64)
ARRAYS = {
    "uint8": (EIGHT, EIGHT),
    "uint8, channels first": (EIGHT.transpose(2, 0, 1), EIGHT),
    "uint8, backwards": (EIGHT[::-1], EIGHT[::-1]),
    "uint16": (DEEP, DEEP / 257),
    "uint16, big end first": (DEEP.astype(">u2"), DEEP / 257),
    "float64": (UNIT, UNIT * 255),
    "float32": (UNIT.astype(np.float32), UNIT * 255),
    "float16": (UNIT.astype(np.float16), UNIT.astype(np.float16).astype(float) * 255),
    "floats beyond by rounding": (UNIT.astype(np.float32) * np.float32(1.0005), (UNIT * 1.0005).clip(0, 1) * 255),
    "bool": (EIGHT > 99, 255 * (EIGHT > 99)),
    "grey": (EIGHT[..., 0], grey(EIGHT[..., 0])),
    "grey of 16": (DEEP[..., 0], grey(DEEP[..., 0] / 257)),
    "grey, one channel": (EIGHT[..., :1], grey(EIGHT[..., 0])),
    "grey, one channel first": (EIGHT[..., 0][None], grey(EIGHT[..., 0])),
    "tensor": (torch.tensor(EIGHT).permute(2, 0, 1), EIGHT),
    "tensor, channels last": (torch.tensor(EIGHT), EIGHT),
    "tensor of floats": (torch.tensor(UNIT).permute(2, 0, 1).float().requires_grad_(), UNIT * 255),
    "tensor of bfloat16": (
        torch.tensor(UNIT).bfloat16().permute(2, 0, 1), torch.tensor(UNIT).bfloat16().double().numpy() * 255,
    ),
    "tensor, grey": (torch.tensor(EIGHT)[..., 0], grey(EIGHT[..., 0])),
    "batch of one": (torch.tensor(UNIT).permute(2, 0, 1)[None], UNIT * 255),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_values_of_arrays_and_tensors(name):
    given, expected = ARRAYS[name]
    assert np.abs(sampled(given) - expected).max() <= (0 if given.dtype in (np.uint8, torch.uint8) else 0.5 + 1e-4)


def test_alpha_of_arrays():
    seen = np.concatenate([EIGHT, np.zeros((*SIZE, 1), np.uint8)], -1)
    seen[:, 20:, 3] = 255
    for given in (seen, torch.tensor(seen).permute(2, 0, 1), seen / 255, seen.astype(np.uint16) * 257):
        found = sampled(given)
        assert (found[:, :20] == 255).all() and (found[:, 20:] == EIGHT[:, 20:]).all()


def test_shapes_that_could_be_both():
    """[4, 6, 3]: an array is rows first; a tensor is channels first, here four of them."""
    values = noise(3).astype(np.uint8)[:4, :6]
    assert (sampled(values, (4, 6)) == values).all()
    opaque = torch.full((4, 6, 3), 255, dtype=torch.uint8)
    opaque[0] = 7
    assert sampled(opaque, (6, 3)).shape == (6, 3, 3) and (sampled(opaque, (6, 3))[..., 0] == 7).all()


class Elsewhere:
    """An array of another library."""

    def __array__(self, dtype=None, copy=None):
        return EIGHT


def test_arrays_of_other_libraries():
    for given in (Elsewhere(), np.ma.masked_array(EIGHT, mask=EIGHT > 9), [Elsewhere()]):
        assert (sampled(given) == EIGHT).all()
    assert as_list(Elsewhere())[0] is EIGHT


def test_several_are_a_list_whatever_holds_them():
    image = Image.fromarray(EIGHT)
    for given in (
        [image, EIGHT],
        (image, EIGHT),
        (i for i in (image, EIGHT)),
        np.stack([EIGHT] * 2),
        [encoded(image)] * 2,
    ):
        assert (as_images(given, SIZE)[1] == as_images(image, SIZE)[0]).all()
    assert len(as_list(torch.zeros(5, 3, 8, 8))) == 5 and len(as_list(b"abc")) == 1


BROKEN = encoded(Image.fromarray(EIGHT), "JPEG")[:500]


@pytest.mark.parametrize("given, says", [
    (np.zeros((5, 8, 6)), "The array [5, 8, 6] cannot be read as an image: its shape is none of [H, W], [H, W, C] and "
                          "[C, H, W] with 1 to 4 channels."),
    (np.zeros(3), "The array [3] cannot be read as an image: its shape is none"),
    (np.zeros((1, 1, 3, 8, 8)), "The array [1, 1, 3, 8, 8] cannot be read as an image: its shape is none"),
    (np.zeros((0, 4, 3)), "it has no pixels"),
    (torch.zeros(3, 0, 4), "The tensor [3, 0, 4] cannot be read as an image: it has no pixels."),
    (torch.rand(3, 8, 8) * 2 - 1, "and floats from 0 to 1 are wanted."),
    (np.full((8, 8, 3), 255.0), "its values run from 255 to 255, and floats from 0 to 1 are wanted."),
    (np.full((8, 8, 3), np.nan), "some of its values are not finite."),
    (torch.full((3, 8, 8), torch.inf), "some of its values are not finite."),
    (np.zeros((8, 8, 3), np.int64), "its values are int64, and uint8, uint16, or floats from 0 to 1 are wanted."),
    (np.zeros((8, 8, 3), complex), "its values are complex128"),
    (np.array([["a"]]), "its values are <U1"),
    (Image.new("RGB", (0, 5)), "The given Image cannot be read as an image: it has no pixels."),
    (Image.new("F", (4, 4), 200), "its values run from 200 to 200, and floats from 0 to 1 are wanted."),
    (Image.new("F", (4, 4), float("nan")), "not finite"),
    (Image.new("I", (4, 4), 70_000), "its values run from 70000 to 70000, which is more than 16 bits."),
    (b"", "The given bytes cannot be read as an image: it is damaged, or no image."),
    (BROKEN, "it is damaged, or no image."),
    (io.StringIO("text"), "The given StringIO cannot be read as an image: it is damaged, or no image."),
    (5, "The given int cannot be read as an image: it is no file, image, array or tensor."),
    ([None], "The given NoneType cannot be read as an image"),
    ("no/such.png", "There is no image no/such.png."),
    ("https://a.b/c.png", "There is no image https://a.b/c.png: web addresses are not fetched, so save it to a file"),
    ("x" * 9999, " cannot be read as an image: File name too long."),
    ("~/no such image.png", "There is no image ~/no such image.png."),
    (f"{__file__}/a.png", "There is no image"),
    ("a\0b.png", "cannot be read as an image"),
    (os.path.dirname(__file__), "cannot be read as an image: it is a folder."),
    (__file__, "test_pictures.py cannot be read as an image: it is damaged, or no image."),
])  # fmt: skip
def test_what_is_no_picture_is_refused_in_one_sentence(given, says):
    with pytest.raises(ValueError) as error:
        as_images(given, SIZE)
    assert says in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_more_pixels_than_memory_are_refused():
    data = bytearray(png16(noise(top=65536)))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match=r"cannot be read as an image: its pixels are too many\."):
        as_images(bytes(data), SIZE)
    data[16:24] = (12_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match=r"its 12000 x 12000 pixels are too many\."):
        as_images(bytes(data), SIZE)


@pytest.fixture
def waiting():
    """Whoever waits for longer than ten seconds is interrupted."""

    def stop(*_):
        raise TimeoutError("it was waited for")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 10)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_pipes_and_devices_are_not_waited_for(waiting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as here:
        here.bind("socket.png")
        for name in ("pipe.png", "socket.png", "/dev/zero"):
            with pytest.raises(
                ValueError, match="cannot be read as an image: it is a pipe, socket or device, and no file"
            ):
                as_images(name, SIZE)
            with pytest.raises(ValueError, match="a pipe, socket or device"):
                as_masks(name, Image.fromarray(EIGHT), SIZE)


def test_masks_of_every_kind():
    """White is where the values are in the upper half; alpha says nothing."""
    white = EIGHT[..., 0] >= 128
    seen = np.stack([EIGHT[..., 0], np.zeros(SIZE, np.uint8)], -1)
    deep = EIGHT[..., 0].astype(np.uint16) * 257
    for mask in (
        Image.fromarray(EIGHT[..., 0]), EIGHT[..., 0], white, torch.tensor(white)[None], deep, EIGHT[..., 0] / 255,
        png16(deep), Image.fromarray(deep), Image.fromarray(seen), Image.fromarray(white),
    ):  # fmt: skip
        assert (as_masks(mask, EIGHT, SIZE)[0, 0].numpy() == white).all()
    assert as_masks(torch.ones(2, 1, *SIZE), EIGHT, SIZE).shape == (2, 1, *SIZE)


def test_a_model_reads_each_image_once(tmp_path):
    """A stream that cannot go back, with a mask of the same size; a generator of images."""
    from tests.inference.test_from_images import mask, model_of, photo

    class Stream(io.RawIOBase):
        """Bytes that can be read once."""

        def __init__(self, data):
            self.left = data

        def read(self, size=-1):
            size = len(self.left) if size is None or size < 0 else size
            part, self.left = self.left[:size], self.left[size:]
            return part

        def seek(self, *_):
            raise io.UnsupportedOperation

    model = model_of("sd15", "lcm")
    expected = model.inpaint("a", photo(), mask(), output_type="latent")
    found = model.inpaint("a", Stream(encoded(photo())), np.asarray(mask()), output_type="latent")
    assert torch.equal(expected, found)
    images = (image for image in (photo(), np.asarray(photo())))
    both = model.img2img("a", images, output_type="latent")
    assert len(both) == 2
    made = model.sample("a", output_type="pt"), model.sample("a")
    one, other = (model.img2img("a", image, output_type="latent") for image in made)
    assert torch.equal(one, other)  # what a model made may start another, as a tensor or as an image
