"""Scenes: the same picture and caption for the same (seed, index), and captions that say only what is true."""

import io
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image

from fewstep.scenes64.scenes import WORDS, Scenes, write_image_folder, write_webdataset
from fewstep.scenes64.scenes.caption import describe
from fewstep.scenes64.scenes.content import COLOURS, FILLS, PLACES, SHAPES, SIZES, draw_scene
from fewstep.scenes64.scenes.render import render

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
SINGULAR = {**{s: s for s in SHAPES}, **{f"{s}s": s for s in SHAPES}, "shape": None, "shapes": None}


@pytest.fixture(scope="module")
def scenes():
    return [Scenes(5).scene(i) for i in range(3000)]


def parse(caption):
    """(number, stated words) of every thing that a caption names, read from the text alone."""
    caption = re.sub(r"^(a picture of|there is|there are) ", "", caption)
    caption = re.sub(r" (and more|and other shapes|among other shapes)$", "", caption)
    found = []
    for phrase in re.split(r", | and ", caption):
        words = phrase.split()
        number, rest = NUMBERS[words[0]], words[1:]
        place = rest.pop() if rest[-1] in PLACES else None
        rest = [w for w in rest if w not in ("on", "in", "at", "the")]
        stated = {"shape": SINGULAR[rest.pop()], "place": place}
        for name, values in (("size", SIZES), ("colour", COLOURS), ("fill", FILLS)):
            stated[name] = rest.pop(0) if rest and rest[0] in values else None
        assert not rest, caption
        found.append((number, stated))
    return found


def test_images_have_their_size_and_type():
    rendered = Scenes(0).render(range(3))
    assert rendered.images.shape == (3, 64, 64, 3) and rendered.images.dtype == np.uint8
    assert Scenes(0, size=32).render([7]).images.shape == (1, 32, 32, 3)
    _, captions, scenes = rendered
    assert captions == [s.caption for s in scenes]


def test_a_scene_does_not_depend_on_its_neighbours():
    together = Scenes(3).render([9, 4, 1000000, 2])
    for place, index in enumerate([9, 4, 1000000, 2]):
        alone = Scenes(3).render([index])
        assert np.array_equal(alone.images[0], together.images[place])
        assert alone.captions[0] == together.captions[place] and alone.scenes[0] == together.scenes[place]


def test_other_seeds_and_indices_give_other_scenes():
    pictures = {Scenes(seed).render([i]).images.tobytes() for seed in range(4) for i in range(8)}
    assert len(pictures) == 32


def test_tellings_change_the_caption_only():
    tellings = [Scenes(1).scene(11, telling) for telling in range(12)]
    assert len({t.caption for t in tellings}) > 3
    assert len({replace(t, caption="", mentions=(), count=None) for t in tellings}) == 1


def test_a_larger_picture_shows_the_same_scene():
    scene = Scenes(2).scene(5)
    small, large = render(scene, 64).astype(float), render(scene, 128).astype(float)
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 6


def test_captions_use_the_closed_vocabulary(scenes):
    used = {word for s in scenes for word in s.caption.replace(",", " ,").split()}
    assert used <= set(WORDS)
    assert set(WORDS) - used == set()


def test_what_is_mentioned_is_true(scenes):
    for scene in scenes:
        assert scene.count in (None, len(scene.things))
        named = [i for m in scene.mentions for i in m.things]
        assert len(named) == len(set(named))
        for mention in scene.mentions:
            for thing in (scene.things[i] for i in mention.things):
                for name in ("shape", "colour", "fill", "size", "place"):
                    assert getattr(mention, name) in (None, getattr(thing, name))


def test_the_text_says_what_the_mentions_say(scenes):
    for scene in (s for s in scenes if s.mentions):
        stated = [(len(m.things), {k: v for k, v in vars(m).items() if k != "things"}) for m in scene.mentions]
        assert parse(scene.caption) == stated
        if scene.count is not None:
            assert sum(number for number, _ in stated) == scene.count


def rate_of_statements(scenes):
    """How often single things' attributes are stated when the thing is named."""
    stated = Counter()
    single = [m for s in scenes for m in s.mentions if len(m.things) == 1]
    for mention in single:
        stated.update(name for name in ("shape", "colour", "fill", "size") if getattr(mention, name))
    return {name: count / len(single) for name, count in stated.items()}


def test_three_quarters_of_the_attributes_are_left_open(scenes):
    rates = rate_of_statements(scenes)
    for name in ("shape", "colour", "fill", "size"):
        assert rates[name] == pytest.approx(0.25, abs=0.03)
    placed = [s.mentions[0].place is not None for s in scenes if s.mentions and len(s.mentions[0].things) == 1
              and s.things[s.mentions[0].things[0]].place]  # fmt: skip
    assert np.mean(placed) == pytest.approx(0.25, abs=0.05)


def test_captions_can_state_more():
    full = [Scenes(5).scene(i, stated=1.0) for i in range(500)]
    assert rate_of_statements(full)["fill"] == 1.0
    assert all(f.things == Scenes(5).scene(i).things for i, f in enumerate(full[:20]))


def test_every_kind_comes_about_equally_often(scenes):
    things = [t for s in scenes for t in s.things]
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        shares = [np.mean([getattr(t, name) == v for t in things]) * len(values) for v in values]
        assert min(shares) > 0.8 and max(shares) < 1.2, name
    assert np.mean([t.fill == "plain" for t in things]) == pytest.approx(0.5, abs=0.03)


def test_places_are_where_they_say(scenes):
    for thing in (t for s in scenes for t in s.things):
        if thing.place in ("left", "right"):
            assert (thing.x < 0.35) if thing.place == "left" else (thing.x > 0.65)
        if thing.place in ("top", "bottom"):
            assert (thing.y < 0.35) if thing.place == "top" else (thing.y > 0.65)


def test_things_lie_almost_within_the_picture_and_stay_visible(scenes):
    for scene in scenes:
        for i, thing in enumerate(scene.things):
            assert 0.8 * thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
            for other in scene.things[:i]:
                assert np.hypot(thing.x - other.x, thing.y - other.y) > 0.55 * (thing.radius + other.radius)


def test_a_plain_circle_has_its_colour_inside_and_the_background_outside():
    rng = Random(0)
    scene = next(s for s in (draw_scene(rng) for _ in range(9999)) if len(s.things) == 1
                 and (s.things[0].shape, s.things[0].fill) == ("circle", "plain"))  # fmt: skip
    thing, picture = scene.things[0], render(scene) / 255
    x, y = int(thing.x * 64), int(thing.y * 64)
    assert np.abs(picture[y, x] - thing.paint).max() < 0.06
    empty = render(replace(scene, things=())) / 255
    differs = np.abs(picture - empty).max(-1) > 0.02
    assert not differs[0].any() or thing.y < 0.4
    rows, columns = np.nonzero(differs)
    assert np.hypot(rows + 0.5 - thing.y * 64, columns + 0.5 - thing.x * 64).max() < thing.radius * 64 + 9


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_smooth_and_fill_their_radius(shape):
    """Anti-aliasing: a white thing on black has a rim of grey, one or two pixels wide, and an extent of 2 radii."""
    scene = next(s for s in (Scenes(8).scene(i) for i in range(999)) if len(s.things) == 1)
    thing = replace(scene.things[0], shape=shape, fill="plain", paint=(1, 1, 1), radius=0.3, x=0.5, y=0.5)
    black = replace(scene.background, kind="gradient", first=(0, 0, 0), second=(0, 0, 0))
    picture = render(replace(scene, things=(thing,), background=black, shadow=(0.0, 0.0)))[..., 0] / 255
    grey = (picture > 0.1) & (picture < 0.75)
    assert 30 < grey.sum() < 0.35 * (picture > 0.75).sum()
    rows, columns = np.nonzero(picture > 0.4)
    reach = np.hypot(rows + 0.5 - 32, columns + 0.5 - 32).max() / (0.3 * 64)
    assert 0.9 < reach < 1.2


def test_a_new_caption_keeps_the_picture():
    scene = Scenes(0).scene(0)
    told = describe(scene, Random(3))
    assert told.things == scene.things and told.caption


def test_an_image_folder_holds_pictures_and_captions(tmp_path):
    write_image_folder(tmp_path, Scenes(4), 70)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 70 == len(list(tmp_path.glob("*.png")))
    rendered = Scenes(4).render([69])
    assert lines[69]["text"] == rendered.captions[0] and lines[69]["index"] == 69
    assert np.array_equal(np.asarray(Image.open(tmp_path / lines[69]["file_name"])), rendered.images[0])


def test_shards_hold_every_scene_once_and_the_same_bytes_again(tmp_path):
    shards = write_webdataset(tmp_path / "a", Scenes(4), 7, shard_size=3)
    again = write_webdataset(tmp_path / "b", Scenes(4), 7, shard_size=3)
    assert [s.name for s in shards] == [f"scenes-{i:06d}.tar" for i in range(3)]
    assert [s.read_bytes() for s in shards] == [s.read_bytes() for s in again]
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            found |= {entry.name: tar.extractfile(entry).read() for entry in tar}
    assert len(found) == 21
    rendered = Scenes(4).render(range(7))
    for i, caption in enumerate(rendered.captions):
        assert found[f"{i:08d}.txt"].decode() == caption
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[f"{i:08d}.png"]))), rendered.images[i])
