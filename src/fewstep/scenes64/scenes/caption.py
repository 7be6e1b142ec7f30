"""Captions: plain English that states some attributes of a scene and leaves the rest open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from fewstep.scenes64.scenes.content import COLOURS, FILLS, PLACES, SHAPES, SIZES, Mention, Scene

DEFAULT_STATED = 0.25
"""Share of the attributes of a named thing that captions state by default.

Many images fit so open a caption, and that is what few steps fail at: of captions that state half, four guided steps
generate nearly what fifty do.
"""

_NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
_OPENINGS = ("", "", "", "a picture of ", "there is ")
_NOTHING = ("shapes", "a picture of shapes", "some shapes", "a picture", "")
_REST = (" and more", " and other shapes", " among other shapes")
_PLACES = {p: f"at the {p}" if p in ("top", "bottom") else f"in the {p}" for p in PLACES} | {
    p: f"on the {p}" for p in ("left", "right")
}


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        " ".join((*_NUMBERS.values(), *_OPENINGS, *_NOTHING, *_REST, *_PLACES.values())).split()
        + ["an", "and", "are", "shape", ",", *SIZES, *COLOURS, *FILLS]
        + [form for shape in SHAPES for form in (shape, _plural(shape))]
    )
)
"""Every word that can stand in a caption; nothing else can."""


def describe(scene: Scene, rng: Random, stated: float = DEFAULT_STATED) -> Scene:
    """``scene`` with a new caption.

    One caption in eight states nothing or only the number; one in four names some of several things. Of what is
    named, size, colour, fill and shape are each kept with probability ``stated`` (without its shape a thing is a
    "shape"), the place of the first likewise where one word gives it.
    """
    number = len(scene.things)
    if rng.random() < 0.125:
        return _vague(scene, rng)
    if number > 1 and len({t.shape for t in scene.things}) == 1:
        groups = [tuple(range(number))]
    else:
        groups = [(i,) for i in rng.sample(range(number), number)]
    partial = len(groups) > 1 and rng.random() < 0.25
    if partial:
        groups = groups[: rng.randint(1, len(groups) - 1)]
    mentions = [_mention(scene, group, rng, stated, placed=i == 0) for i, group in enumerate(groups)]
    text = _join([_phrase(m) for m in mentions], closed=not partial)
    opening = rng.choice(_OPENINGS)
    if opening == "there is " and len(mentions[0].things) > 1:
        opening = "there are "
    caption = opening + text + (rng.choice(_REST) if partial else "")
    return replace(scene, caption=caption, mentions=tuple(mentions), count=None if partial else number)


def _vague(scene: Scene, rng: Random) -> Scene:
    number = len(scene.things)
    if rng.random() < 0.5:
        return replace(scene, caption=rng.choice(_NOTHING), mentions=(), count=None)
    caption = f"{_NUMBERS[number]} shape{'s' if number > 1 else ''}"
    return replace(scene, caption=caption, mentions=(), count=number)


def _mention(scene: Scene, group: tuple[int, ...], rng: Random, stated: float, placed: bool) -> Mention:
    """The statements about the things in ``group``; of several, only what they share."""
    things = [scene.things[i] for i in group]

    def keep(values: Sequence[str | None], probability: float = stated) -> str | None:
        chosen = rng.random() < probability
        return values[0] if chosen and len(set(values)) == 1 else None

    return Mention(
        things=group,
        shape=keep([t.shape for t in things]),
        colour=keep([t.colour for t in things]),
        fill=keep([t.fill for t in things]),
        size=keep([t.size for t in things]),
        place=keep([things[0].place], stated if placed and len(group) == 1 else 0.0),
    )


def _phrase(mention: Mention) -> str:
    number = len(mention.things)
    noun = mention.shape or "shape"
    if number > 1:
        noun = _plural(noun)
    words = [w for w in (mention.size, mention.colour, mention.fill, noun) if w]
    article = "an" if number == 1 and words[0][0] in "aeiou" else _NUMBERS[number]
    place = [_PLACES[mention.place]] if mention.place else []
    return " ".join([article, *words, *place])


def _join(phrases: list[str], closed: bool) -> str:
    if closed and len(phrases) > 1:
        return ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return ", ".join(phrases)
