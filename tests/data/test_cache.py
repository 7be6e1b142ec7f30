"""Encoded data: of pictures, buckets and prompts; kept, made again, gone on with; and what is let go afterwards."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import weakref

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fewstep.data import cache
from fewstep.data.cache import image_latents, prompt_latents
from fewstep.data.images import CaptionedImage, Collection, Skipped, pixels
from fewstep.data.random import Rng
from fewstep.data.sources import Buckets, LatentSource
from fewstep.models.cond import Cond
from fewstep.models.families import as_teacher
from tests.models.pipelines import PROMPTS, SIZE, build


def made(name, size=(64, 64), colour="red", caption="a red circle", stamp="0"):
    def read():
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, "PNG")
        return file.getvalue()

    return CaptionedImage(name, caption, stamp, read)


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(build("sdxl"), size=SIZE)


@pytest.fixture
def pictures():
    return Collection((made("a"), made("b", colour="blue", caption="a blue square")), (Skipped("c", "it is odd"),))


def changed(collection, number, **fields):
    pictures = list(collection.images)
    pictures[number] = made(pictures[number].name, **fields)
    return Collection(tuple(pictures), collection.skipped)


def test_latents_are_the_teachers_of_these_pictures(teacher, pictures, tmp_path):
    source = image_latents(tmp_path / "latents", teacher, pictures)
    images = torch.stack([pixels(p, lambda height, width: (SIZE, SIZE)) for p in pictures.images]).float() / 127.5 - 1
    mean, std = teacher.encode_images(images)
    torch.testing.assert_close(source.mean.float(), mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(source.std.float(), std, rtol=1e-3, atol=1e-3)
    cond = teacher.encode_prompts(["a red circle", "a blue square"])
    assert set(source.cond) == {"prompt_embeds", "pooled_embeds", "time_ids"}
    for name in cond:
        torch.testing.assert_close(source.cond[name].float(), cond[name].float(), rtol=1e-3, atol=1e-3)
    assert source.cond["time_ids"].tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2
    assert source.cond.null()["time_ids"].tolist() == source.cond["time_ids"].tolist()


def test_a_changed_caption_picture_or_size_is_encoded_again(teacher, pictures, tmp_path):
    path, encoded = tmp_path / "cache" / "latents", []

    def latents(found=pictures, by=teacher):
        return image_latents(path, by, found, advance=encoded.append)

    first = latents()
    assert encoded == [2] and torch.equal(latents().mean, first.mean) and encoded == [2]
    other = latents(changed(pictures, 1, colour="blue", caption="a square"))
    assert torch.equal(other.mean, first.mean) and encoded == [2, 2]
    assert not torch.equal(other.cond["prompt_embeds"], first.cond["prompt_embeds"])
    assert not torch.equal(latents(changed(pictures, 0, colour="green", stamp="1")).mean, first.mean)
    assert encoded == [2, 2, 2]
    assert changed(pictures, 0, stamp="1").fingerprint() != pictures.fingerprint()
    larger = latents(by=as_teacher(build("sdxl"), size=2 * SIZE))
    assert larger.mean.shape[-1] == 2 * first.mean.shape[-1] and encoded == [2, 2, 2, 2]
    assert larger.checksum() != first.checksum() == latents().checksum()


@pytest.mark.parametrize("what", ["images", "prompts"])
def test_data_of_another_teacher_are_encoded_again(what, teacher, pictures, tmp_path):
    """As wide and as large, with other weights: the files must not pass for this teacher's."""
    pipeline = copy.copy(build("sdxl"))
    others = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("vae", "text_encoder", "text_encoder_2")}
    with torch.no_grad():
        for weight in (weight for part in others.values() for weight in part.parameters()):
            weight.mul_(1.2)
    pipeline.register_modules(**others)
    another = as_teacher(pipeline, "another", size=SIZE)

    def encoded(by, path):
        if what == "prompts":
            return prompt_latents(path, by, PROMPTS)
        return image_latents(path, by, pictures)

    first, second = encoded(teacher, tmp_path / "mine"), encoded(another, tmp_path / "mine")
    fresh = encoded(another, tmp_path / "fresh")
    assert first.checksum() != fresh.checksum() == second.checksum()
    assert torch.equal(second.cond["prompt_embeds"], fresh.cond["prompt_embeds"])
    student = dataclasses.replace(another, name="a student of it")  # whose VAE and text encoders are the model's own
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("mine*")}
    encoded(student, tmp_path / "mine")
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("mine*")}


def test_what_cannot_be_read_is_passed_over_and_listed(teacher, pictures, tmp_path):
    broken = CaptionedImage("x", "a red\ncircle", "0", lambda: b"no picture")
    tiny = made("y", size=(1, 1))
    some = Collection((pictures.images[0], broken, tiny, pictures.images[1]), pictures.skipped)
    for _ in range(2):  # encoded, and found again
        source = image_latents(tmp_path / "latents", teacher, some)
        assert len(source.mean) == len(source.cond) == 2
        assert (tmp_path / cache.SKIPPED).read_text().splitlines() == [
            "c: it is odd", "x: it is damaged, or no image", "y: its 1 x 1 pixels are too few",
        ]  # fmt: skip
    assert torch.equal(source.mean, image_latents(tmp_path / "good", teacher, pictures).mean)
    image_latents(tmp_path / "latents", teacher, Collection(pictures.images))
    assert not (tmp_path / cache.SKIPPED).exists()
    with pytest.raises(ValueError, match=r"none of the 2 images could be used, the first: x: it is damaged"):
        image_latents(tmp_path / "latents", teacher, Collection((broken, tiny)))


def test_an_interrupted_encoding_goes_on_where_it_was(teacher, tmp_path, monkeypatch):
    """Files of two pictures; the third file's picture interrupts. What is there is not read again."""
    monkeypatch.setattr(cache, "_PER_FILE", 2)
    colours = ("red", "blue", "green", "white", "black")
    asked = []

    def watched(number, stop=False):
        def read():
            asked.append(number)
            if stop:
                raise KeyboardInterrupt
            return made("a", colour=colours[number]).read()

        return CaptionedImage(str(number), f"a {colours[number]} circle", "0", read)

    def collection(stop=None):
        return Collection(tuple(watched(i, i == stop) for i in range(5)))

    with pytest.raises(KeyboardInterrupt):
        image_latents(tmp_path / "latents", teacher, collection(stop=3))
    assert asked == [0, 1, 2, 3] and len(list(tmp_path.iterdir())) == 1
    whole = image_latents(tmp_path / "latents", teacher, collection())
    assert asked[4:] == [2, 3, 4]
    at_once = image_latents(tmp_path / "other", teacher, collection())
    assert whole.checksum() == at_once.checksum() and len(whole.cond) == 5
    second = tmp_path / "latents-00001.safetensors"
    second.write_bytes(second.read_bytes()[:-5])
    asked.clear()
    assert image_latents(tmp_path / "latents", teacher, collection()).checksum() == whole.checksum()
    assert asked == [2, 3]
    with safe_open(second, framework="pt") as file:
        assert file.metadata()["rows"] == "2 to 4 of 5"


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart"])
def test_buckets_have_their_own_shapes_and_the_network_is_told_them(family, tmp_path):
    teacher = as_teacher(build(family), size=SIZE)
    shapes = [(64, 64), (120, 60), (60, 125), (128, 64), (64, 65)]
    some = Collection(tuple(made(str(i), size=(w, h)) for i, (h, w) in enumerate(shapes)))
    source = image_latents(tmp_path / "latents", teacher, some, buckets=True)
    assert isinstance(source, Buckets)
    down = SIZE // teacher.latent_shape[1]
    sizes = [tuple(side * down for side in part.mean.shape[-2:]) for part in source.sources]
    assert len(sizes) == 3 and [len(part.cond) for part in source.sources] == [1, 2, 2]
    assert all(h * w <= SIZE**2 for h, w in sizes) and sizes[1] == (SIZE, SIZE) and sizes[0][0] < sizes[0][1]
    for part, (height, width) in zip(source.sources, sizes, strict=True):
        told = {
            "sdxl": {"time_ids": [height, width, 0, 0, height, width]},
            "pixart": {"resolution": [height, width], "aspect_ratio": [height / width]},
        }.get(family, {})
        for name, values in told.items():
            for cond in (part.cond, part.cond.null()):
                torch.testing.assert_close(cond[name][0].float(), torch.tensor(values).float(), rtol=1e-3, atol=0)
        batch = part.batch(Rng(0, 0, 2))
        output = teacher.denoiser(batch.x0, teacher.denoiser.schedule.start, batch.cond, 2.0).output
        assert output.shape == batch.x0.shape and output.isfinite().all()
    again = image_latents(tmp_path / "latents", teacher, some, buckets=True)
    assert again.checksum() == source.checksum()
    square = image_latents(tmp_path / "latents", teacher, some)
    assert isinstance(square, LatentSource) and len(square.mean) == 5


def test_pixels_of_a_bucket_are_the_pictures_own(teacher, tmp_path):
    """A broad picture: its latents are those of the uncut picture, and not of its middle square."""
    image = Image.linear_gradient("L").rotate(90).resize((128, 32))
    data = io.BytesIO()
    image.save(data, "PNG")
    some = Collection((CaptionedImage("a", "a", "0", data.getvalue),))
    source = image_latents(tmp_path / "latents", teacher, some, buckets=True)
    whole = torch.tensor([list(image.getdata())]).view(1, 1, 32, 128).expand(-1, 3, -1, -1).float() / 127.5 - 1
    torch.testing.assert_close(source.mean.float(), teacher.encode_images(whole)[0], rtol=2e-3, atol=2e-3)


def test_prompts_are_encoded_without_pictures(teacher, tmp_path):
    source = prompt_latents(tmp_path / "latents", teacher, PROMPTS)
    cond = teacher.encode_prompts(PROMPTS)
    torch.testing.assert_close(source.cond["prompt_embeds"].float(), cond["prompt_embeds"], rtol=1e-3, atol=1e-3)
    assert source.shape == teacher.latent_shape
    assert prompt_latents(tmp_path / "latents", teacher, PROMPTS).checksum() == source.checksum()
    assert prompt_latents(tmp_path / "latents", teacher, PROMPTS[::-1]).checksum() != source.checksum()


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart"])
def test_text_encoders_are_let_go_and_what_was_asked_for_is_kept(family):
    from tests.models.pipelines import BUILD

    teacher = as_teacher(BUILD[family](), size=SIZE)
    encoders = [part for name, part in teacher.pipeline.components.items() if name.startswith("text_encoder")]
    watched = [weakref.ref(weight) for part in encoders for weight in (part, *part.parameters())]
    count = len(encoders)
    del encoders
    before = teacher.encode_prompts(PROMPTS)
    x = torch.randn(1, *teacher.latent_shape)
    pictures = teacher.decode(x)
    teacher.make_room([PROMPTS])
    gc.collect()
    assert len(watched) > count > 0 and all(reference() is None for reference in watched)
    kept = teacher.encode_prompts(tuple(PROMPTS))
    assert all(
        torch.equal(kept[name], before[name]) and torch.equal(kept.null()[name], before.null()[name]) for name in before
    )
    assert torch.equal(teacher.decode(x), pictures)
    with pytest.raises(ValueError, match="text encoders were freed"):
        teacher.encode_prompts(["another"])


def test_the_network_predicts_the_same_without_the_padding_of_prompts(tmp_path):
    """PixArt is given the mask: to the bit. SD3 and FLUX attend to the padding, which is therefore kept."""
    for family in ("pixart", "sd3", "flux"):
        teacher = as_teacher(build(family), size=SIZE)
        source = prompt_latents(tmp_path / family, teacher, ["a red circle", "a"])
        with safe_open(tmp_path / f"{family}-00000.safetensors", framework="pt") as file:
            assert any("/cut." in key for key in file.keys()) == (family == "pixart")  # noqa: SIM118
        whole, stored = teacher.encode_prompts(["a red circle", "a"]).to(torch.float16), source.cond
        x, t = torch.randn(2, *teacher.latent_shape), teacher.denoiser.schedule.start
        first, second = (teacher.denoiser(x, t, cond, 2.0).output for cond in (whole, stored))
        assert torch.equal(first, second)
        emptied = stored["prompt_embeds"].clone()
        emptied[:, -1] = 0
        changed = Cond({**stored.tensors, "prompt_embeds": emptied}, stored.null().tensors)
        assert torch.equal(teacher.denoiser(x, t, changed, 2.0).output, first) == (family == "pixart")
