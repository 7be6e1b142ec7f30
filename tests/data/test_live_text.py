"""Captions that stay text: batches have the conditions of kept embeddings, to the bit; files hold a few bytes each."""

import io
import warnings

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fewstep.data import cache
from fewstep.data.cache import image_latents, prompt_latents
from fewstep.data.images import CaptionedImage, Collection
from fewstep.data.pairs import PairFiles
from fewstep.data.random import Rng
from fewstep.data.rows import CAPTION, Held, Stored
from fewstep.data.sources import Buckets, CaptionDropout, prefetch
from fewstep.models.families import as_teacher
from tests.models.pipelines import SIZE, build

CAPTIONS = ["a red circle", "ünï 🎨 \u2028 on", "a", "blue", "a blue square on grass " * 9 + "a", "\x0bgrass\x85 a"]

FAMILIES = ["sdxl", "flux", "pixart", *(pytest.param(family, marks=pytest.mark.slow) for family in ("sd15", "sd3"))]


def teacher_of(family):
    return as_teacher(build(family), size=SIZE)


def same(mine, theirs):
    assert set(mine) == set(theirs) and len(mine)
    for one, other in ((mine, theirs), (mine.null(), theirs.null())):
        for name in one:
            assert torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype, name


def parts(source, step, batch_size=4, pieces=2):
    """The batch of a step in so many micro-batches, the next one read ahead."""
    each = batch_size // pieces
    rngs = [Rng(0, step, batch_size, slice(i * each, (i + 1) * each)) for i in range(pieces)]
    for rng in rngs:
        yield source.batch(rng)
        prefetch(source, rngs[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_are_those_of_kept_embeddings(family, tmp_path, monkeypatch):
    """From memory and from disk, in one micro-batch or several, with captions dropped; and by the encoders' own call.

    The null is encoded once for the whole data set, here of two files, and never in a step.
    """
    monkeypatch.setattr(cache, "_PER_FILE", 4)
    teacher = teacher_of(family)
    kept = prompt_latents(tmp_path / "kept", teacher, CAPTIONS)
    asked, null = [], teacher.family.null
    teacher.family.null = lambda: (asked.append(1), null())[1]
    held = prompt_latents(tmp_path / "live", teacher, CAPTIONS, live=True)
    assert asked == [1]
    monkeypatch.setattr(cache, "HELD", 0)
    stored = prompt_latents(tmp_path / "live", teacher, CAPTIONS, live=True)
    assert isinstance(held.rows, Held) and isinstance(stored.rows, Stored)
    for live in (held, stored):
        for step in range(3):
            for pieces in (1, 2):
                for mine, theirs in zip(parts(live, step, 4, pieces), parts(kept, step, 4, pieces), strict=True):
                    same(mine.cond, theirs.cond)
        mine, theirs = (next(parts(CaptionDropout(source, 0.5), 0, pieces=1)) for source in (live, kept))
        same(mine.cond, theirs.cond)
    assert asked == [1]
    rows = held.order.rows(Rng(0, 5, 4))
    alone = [teacher.encode_prompts([CAPTIONS[row]])["prompt_embeds"].half() for row in rows]
    if family != "pixart":  # whose padding is cut
        found = held.batch(Rng(0, 5, 4)).cond["prompt_embeds"]
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-3, atol=1e-3)
    same(held.cond, kept.cond)  # of all rows
    assert held.checksum() == stored.checksum() != kept.checksum()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sana", "qwen_image"])
def test_language_models_encode_to_the_same_tokens(family, tmp_path):
    """Their attention rounds otherwise in a batch of another size; texts of no common length are padded less."""
    teacher = teacher_of(family)
    kept, live = (prompt_latents(tmp_path / str(how), teacher, CAPTIONS, live=how) for how in (False, True))
    for step in range(3):
        mine, theirs = (source.batch(Rng(0, step, 4)).cond for source in (live, kept))
        assert set(mine) == set(theirs)
        for name in set(mine) - {"prompt_embeds"}:
            assert torch.equal(mine[name], theirs[name])
        tokens = mine["prompt_embeds"].shape[1]
        few, many = mine["prompt_embeds"], theirs["prompt_embeds"]
        limit = 2 * torch.finfo(few.dtype).eps
        torch.testing.assert_close(few, many[:, :tokens], rtol=limit, atol=limit)
        assert few.dtype == many.dtype and not many[:, tokens:].any()


def picture(number, size):
    def read():
        data = io.BytesIO()
        Image.new("RGB", size, (40 * number,) * 3).save(data, "PNG")
        return data.getvalue() if number != 2 else b"no image"

    return CaptionedImage(str(number), CAPTIONS[number], "0", read)


@pytest.mark.parametrize("family", ["sdxl", pytest.param("pixart", marks=pytest.mark.slow)])
def test_images_keep_their_captions_sizes_and_latents(family, tmp_path):
    """In buckets, whose sizes some networks are told, with a damaged image among them."""
    teacher = teacher_of(family)
    found = Collection(tuple(picture(i, ((64, 64), (128, 64))[i % 2]) for i in range(6)))
    kept, live = (image_latents(tmp_path / str(how), teacher, found, buckets=True, live=how) for how in (False, True))
    assert isinstance(live, Buckets) and len(live.sources) == 2
    for step in range(4):
        mine, theirs = live.batch(Rng(0, step, 2)), kept.batch(Rng(0, step, 2))
        assert torch.equal(mine.x0, theirs.x0)
        same(mine.cond, theirs.cond)
    assert (tmp_path / "skipped.txt").read_text() == "2: it is damaged, or no image\n"


def test_files_of_one_kind_do_not_pass_for_the_other(tmp_path):
    teacher, made = teacher_of("sd15"), []

    def latents(live):
        source = prompt_latents(tmp_path / "latents", teacher, CAPTIONS, made.append, live=live)
        return CAPTION in source.rows

    assert [latents(live) for live in (False, True, True, False)] == [False, True, True, False]
    assert made == [6, 6, 6]  # found once


def test_a_caption_takes_its_bytes(tmp_path):
    """A tiny FLUX's 512 tokens are 24 wide, FLUX's own 4,096; its captions are as long."""
    teacher, many = teacher_of("flux"), [f"a red circle {i}" for i in range(40)]
    sizes = {}
    for live in (False, True):
        prompt_latents(tmp_path / str(live), teacher, many, live=live)
        with safe_open(tmp_path / f"{live}-00000.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if "/null." not in key}  # noqa: SIM118
        sizes[live] = sum(t.nbytes for t in tensors.values())
    assert sizes[True] == sum(len(text) + 4 for text in many)
    assert sizes[False] == 40 * 2 * (512 * 24 + 16) and sizes[True] < 0.25 * sizes[False]


def test_pairs_keep_captions_likewise(tmp_path):
    teacher, x0 = teacher_of("flux"), torch.randn(6, 4, 2, 2)
    about = {"size": 6, "batch_size": 4, "seed": 3}
    sources = []
    for number, live in enumerate((False, True)):
        files = PairFiles(tmp_path / str(live), about | ({"text": "live"} if live else {}))
        files.check(), files.claim()
        for number in files.missing():
            rows = [CAPTIONS[i] for i in files.rows(number)]
            files.write(number, x0[list(files.rows(number))], teacher.encode_prompts(rows), 1.0, rows if live else ())
        sources.append(files.load(cache.encoder(teacher) if live else None))
    kept, live = sources
    assert CAPTION in live.rows and "cond.prompt_embeds" not in live.rows
    for step in range(3):
        mine, theirs = (source.pairs(Rng(0, step, 4)) for source in (live, kept))
        assert torch.equal(mine.x0, theirs.x0) and torch.equal(mine.noise, theirs.noise)
        same(mine.cond, theirs.cond)
        same(live.batch(Rng(0, step, 4)).cond, kept.batch(Rng(0, step, 4)).cond)
    with pytest.raises(ValueError, match=r"holds the samples of a run with data\.text = live: delete"):
        PairFiles(tmp_path / "True", about).check()


def test_a_long_caption_is_remarked_once_when_data_are_prepared(tmp_path):
    teacher = teacher_of("sd15")
    with pytest.warns(UserWarning, match="longer than the 77 tokens") as caught:
        source = prompt_latents(tmp_path / "live", teacher, ["a red circle " * 60, *CAPTIONS], live=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.batch(Rng(0, 0, 7))
