"""Preferences from files, whatever the files are; and the simulated raters that stand in for people on scenes-64."""

import json
import math
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.preferences import FILE, Preference, read_preferences
from fewstep.data.random import Rng
from fewstep.data.sources import LatentSource, WithPrompts
from fewstep.scenes64.scenes import Scenes
from fewstep.scenes64.scenes.content import draw_like
from fewstep.scenes64.scenes.raters import CALM, SHARPNESS, SIZE, WARM, WARMTH, pair_of, taste, write_preferences


def write(folder, *lines):
    for name in ("a.png", "b.png", "sub/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / FILE).write_text(text, encoding="utf-8")
    return folder


def test_three_layouts_say_the_same(tmp_path):
    place = write(
        tmp_path,
        {"prompt": "a cat", "chosen": "a.png", "rejected": "sub/c.png", "probability": 0.75, "user": 3},
        '\r\n{"prompt": "a cat", "chosen": "a.png", "rejected": "b.png", "said": "one\u2028two\u0085three"}\r',
        "",
        {"caption": "a cat", "jpg_0": "a.png", "jpg_1": "sub/c.png", "label_0": 1, "label_1": 0},
        {"caption": "a cat", "jpg_0": "sub/c.png", "jpg_1": "a.png", "label_0": 0.0, "label_1": 1},
        {"caption": "a tie", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0.5},
        {"prompt": "a cat", "image_path": ["a.png", "sub/c.png"], "human_preference": [1, 0]},
        {"prompt": "a cat", "image_path": ["sub/c.png", "a.png"], "human_preference": [0, 1]},
    )
    found = read_preferences(place)
    same = Preference("a cat", (place / "a.png").resolve(), (place / "sub/c.png").resolve())
    assert found.ties == 1 and found.choices[0].probability == 0.75
    assert found.choices[1].rejected == (place / "b.png").resolve()
    assert found.choices[2:] == (same,) * 4
    assert (found.choices[0].chosen, found.choices[0].rejected) == (same.chosen, same.rejected)


PLAIN = {"prompt": "a", "chosen": "a.png", "rejected": "b.png"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no JSON object of a choice"),
        ("[1, 2]", "is no JSON object of a choice"),
        ("[" * 50_000, "is no JSON object of a choice"),
        ('{"prompt": "' + "a" * 200_000 + '"}', "is no JSON object of a choice"),
        ({"prompt": "a", "chosen": "a.png"}, "must have prompt, chosen and rejected, or the columns of Pick-a-Pic"),
        (PLAIN | {"prompt": 3}, "has a prompt that is no text"),
        (PLAIN | {"chosen": None}, "must name its images' files, as text"),
        (PLAIN | {"chosen": ["a.png"]}, "must name its images' files, as text"),
        (PLAIN | {"chosen": "a\0.png"}, "must name its images' files, as text"),
        (PLAIN | {"chosen": "../out.png"}, "names '../out.png': it lies outside the folder"),
        (PLAIN | {"chosen": "sub/../../out.png"}, "it lies outside the folder"),
        (PLAIN | {"chosen": "/etc/hostname"}, "it lies outside the folder"),
        (PLAIN | {"chosen": "link.png"}, "names 'link.png': it lies outside the folder"),
        (PLAIN | {"chosen": "none.png"}, "names 'none.png': it is not there"),
        (PLAIN | {"chosen": "sub"}, "names 'sub': it is not there"),
        (PLAIN | {"rejected": "sub/../a.png"}, "chooses between an image and itself"),
        (PLAIN | {"probability": 2}, "has a probability that is no number from 0 to 1"),
        (PLAIN | {"probability": True}, "has a probability that is no number from 0 to 1"),
        ('{"prompt": "a", "chosen": "a.png", "rejected": "b.png", "probability": NaN}', "no number from 0 to 1"),
        ({"caption": "a", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 2}, "label_0 that is none of 1, 0 and 0.5"),
        ({"caption": "a", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": True}, "label_0 that is none of"),
        ({"caption": "a", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": "1"}, "label_0 that is none of"),
        ({"prompt": "a", "image_path": ["a.png"], "human_preference": [1]}, "must have two image_path"),
        ({"prompt": "a", "image_path": ["a.png", "b.png"], "human_preference": [1, 1]}, "human_preference"),
        ({"prompt": "a", "image_path": "ab", "human_preference": [1, 0]}, "must have two image_path"),
    ],
)
def test_a_bad_line_is_one_sentence_that_names_it(tmp_path, line, said):
    (tmp_path / "out.png").write_bytes(b"")
    place = write(tmp_path / "in", PLAIN, line)
    (place / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"^Line 2 of .*preferences.jsonl") as error:
        read_preferences(place)
    assert said in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_folder_without_choices_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"There are no preferences in .*: it must hold preferences.jsonl"):
        read_preferences(tmp_path)
    place = write(tmp_path, {"caption": "a tie", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0.5})
    with pytest.raises(ValueError, match="holds no choice to learn from"):
        read_preferences(place)
    (place / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        read_preferences(place)


# ---------------------------------------------------------------- simulated raters


def test_both_scenes_of_a_pair_are_as_the_caption_says():
    """Everything that is stated holds of the thing it is stated of; what is left open differs."""
    scenes, differ = Scenes(4), 0
    for i in range(60):
        scene = scenes.scene(i)
        other = draw_like(scene, Random(i))
        assert other.caption == scene.caption and len(other.things) == len(scene.things)
        for mention in scene.mentions:
            for thing in (other.things[j] for j in mention.things):
                stated = {name: getattr(mention, name) for name in ("shape", "colour", "fill", "size", "place")}
                assert all(value is None or getattr(thing, name) == value for name, value in stated.items())
        differ += [t.colour for t in other.things] != [t.colour for t in scene.things]
        assert other.background != scene.background
    assert differ > 20


def test_raters_choose_by_their_rule_and_with_their_noise():
    """Probabilities are Bradley and Terry's of the rule; over many pairs choices are as frequent as they are likely."""
    surprise = spread = 0.0
    for i in range(300):
        chosen, rejected, probability, _ = pair_of(5, i)
        tastes = []
        for scene in (chosen, rejected):
            liked = [
                WARMTH * (t.colour in WARM) + SIZE * (t.size == "large") + CALM * (t.fill == "plain")
                for t in scene.things
            ]
            tastes.append(sum(liked) / len(liked))
        assert probability == pytest.approx(1 / (1 + math.exp(SHARPNESS * (tastes[1] - tastes[0]))), rel=1e-12)
        likely = max(probability, 1 - probability)
        surprise += ((probability == likely) - likely) * (likely > 0.5)
        spread += likely * (1 - likely) * (likely > 0.5)
    assert abs(surprise) < 4 * spread**0.5
    assert taste(()) == 0.0


def test_the_stand_in_is_the_same_for_a_seed_and_states_its_ceiling(tmp_path):
    seen = []

    def decode(images, number):
        seen.append((number, len(images)))
        return 255 - images

    plain, again, decoded = (tmp_path / name for name in ("plain", "again", "decoded"))
    ceilings = [write_preferences(plain, 7, 20), write_preferences(again, 7, 20)]
    write_preferences(decoded, 7, 20, decode)
    files = sorted(p.relative_to(plain) for p in plain.rglob("*") if p.is_file())
    assert len(files) == 42 and all((plain / f).read_bytes() == (again / f).read_bytes() for f in files)
    found = read_preferences(plain)
    likely = [max(choice.probability, 1 - choice.probability) for choice in found.choices]
    assert len(likely) == 20 and ceilings[0] == ceilings[1] == pytest.approx(sum(likely) / 20)
    assert 0.5 < ceilings[0] < 1
    assert all(json.loads(line)["raters"] == "simulated" for line in (plain / FILE).read_text().splitlines())
    assert "no people" in json.loads((plain / "raters.json").read_text())["raters"]
    changed = [c.chosen.read_bytes() != (decoded / c.chosen.relative_to(plain)).read_bytes() for c in found.choices]
    assert seen == [(0, 2 * sum(changed))] and 0 < sum(changed) < 20
    i = changed.index(True)
    both = [np.asarray(Image.open(p / found.choices[i].rejected.relative_to(plain))) for p in (plain, decoded)]
    assert np.array_equal(both[1], 255 - both[0])
    assert write_preferences(tmp_path / "other", 8, 20) != ceilings[0]


# ---------------------------------------------------------------- captions beside latents


def test_prompts_are_those_of_their_rows():
    latents = LatentSource(torch.arange(7.0)[:, None], torch.zeros(7, 1), None)
    source = WithPrompts(latents, [f"row {i}" for i in range(7)])
    for step in range(4):
        batch = source.batch(Rng(0, step, 6))
        assert batch.prompts == tuple(f"row {int(x)}" for x in batch.x0)
        parts = [source.batch(Rng(0, step, 6, slice(i, i + 2))).prompts for i in (0, 2, 4)]
        assert sum(parts, ()) == batch.prompts
