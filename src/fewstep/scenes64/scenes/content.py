"""The content of a scene, and its sampling from a stream of random numbers.

Lengths are fractions of the image's side, so a scene can be rendered at any size; y points down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

RGB = tuple[float, float, float]

FORM = 3
"""Of the scenes: one more whenever the same address gives another image. What was encoded of another form is stale."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
FILLS = {"plain": 0.5, "striped": 0.125, "checked": 0.125, "dotted": 0.125, "grainy": 0.125}
"""Kinds and how often they come."""
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "middle")
COLOURS: dict[str, RGB] = {
    "red": (0.86, 0.12, 0.13),
    "orange": (0.98, 0.53, 0.08),
    "yellow": (0.98, 0.88, 0.16),
    "green": (0.16, 0.62, 0.22),
    "blue": (0.13, 0.32, 0.85),
    "purple": (0.48, 0.17, 0.66),
    "pink": (0.98, 0.55, 0.75),
    "white": (0.96, 0.96, 0.95),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "fill": tuple(FILLS), "size": SIZES,
}  # fmt: skip
"""The attributes of a thing apart from its place, and their values in a fixed order."""
BACKGROUNDS = {"gradient": 0.4, "glow": 0.3, "bands": 0.1, "tiles": 0.1, "clouds": 0.1}
"""Kinds and how often they come."""
NUMBERS = (0.6, 0.25, 0.1, 0.05)
"""How often 1, 2, 3 and 4 things come."""

_SMALL = (0.15, 0.18)
_LARGE = {1: (0.25, 0.33), 2: (0.22, 0.27), 3: (0.21, 0.23), 4: (0.2, 0.22)}  # radii by the number of things
_PERIOD = (0.163, 0.17)
_GRAIN = (0.04, 0.05)  # fine enough never to resemble another fill by chance
_CENTRED = {"striped": (0.0, 0.0), "checked": (0.0, 0.0), "dotted": (0.5, 0.5)}
"""Phases of regular patterns, at which the middle of a thing is that of a stripe, check or dot."""
_TURN = 0.2  # largest rotation of a thing, in radians
_CENTRE = 0.34  # positions below it count as left or top, those above 1 minus it as right or bottom


def place_of(x: float, y: float) -> str | None:
    """The one of PLACES that holds without doubt, else None."""
    right, low = x - 0.5, y - 0.5
    if max(abs(right), abs(low)) < 0.1:
        return "middle"
    if abs(right) > 0.5 - _CENTRE and abs(right) > 1.5 * abs(low):
        return "right" if right > 0 else "left"
    if abs(low) > 0.5 - _CENTRE and abs(low) > 1.5 * abs(right):
        return "bottom" if low > 0 else "top"
    return None


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        shape, colour, fill, size: names from SHAPES, COLOURS, FILLS, SIZES.
        x, y, radius: place of the centre and extent, in sides of the image.
        angle: of the shape, radians.
        paint, second: RGB in [0, 1] of the fill and of its pattern.
        fill_angle, fill_period, fill_phase, fill_seed: of the pattern; the period in sides of the image.
    """

    shape: str
    colour: str
    fill: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    paint: RGB
    second: RGB
    fill_angle: float
    fill_period: float
    fill_phase: tuple[float, float]
    fill_seed: int

    @property
    def place(self) -> str | None:
        """Its place, if one word gives it without doubt."""
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class Background:
    """A gradient from ``first`` to ``second`` along ``angle``, with a faint pattern of ``period``."""

    kind: str
    first: RGB
    second: RGB
    angle: float
    period: float
    contrast: float
    phase: tuple[float, float]
    seed: int


@dataclass(frozen=True)
class Mention:
    """The statements of a caption about one thing, or about ``len(things)`` alike; None is left open."""

    things: tuple[int, ...]
    shape: str | None = None
    colour: str | None = None
    fill: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """An image's content and its caption.

    Attributes:
        things: back to front.
        background, light: behind the things; direction towards which shadows fall, radians.
        shadow: (offset in sides, strength).
        caption: the text; ``mentions`` are its statements, all of them true.
        count: the number of things if the caption states it, else None.
    """

    things: tuple[Thing, ...]
    background: Background
    light: float
    shadow: tuple[float, float]
    caption: str = ""
    mentions: tuple[Mention, ...] = ()
    count: int | None = None


def draw_scene(rng: Random, numbers: Sequence[float] = NUMBERS, fills: Mapping[str, float] = FILLS) -> Scene:
    """A scene without caption: 1-4 things, sometimes of one kind, on a background of other colours than theirs.

    Args:
        numbers, fills: how often 1, 2, 3 and 4 things come, and each kind of fill.
    """
    number = rng.choices((1, 2, 3, 4), numbers)[0]
    same_shape = number > 1 and rng.random() < 0.2
    same_colour = same_shape and rng.random() < 0.5
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    things: list[Thing] = []
    for _ in range(number):
        if not same_shape:
            shape = rng.choice(SHAPES)
        if not same_colour:
            colour = rng.choice(tuple(COLOURS))
        things.append(_draw_thing(rng, shape, colour, things, number, fills))
    background = _draw_background(rng, [t.paint for t in things])
    return Scene(tuple(things), background, rng.uniform(0, math.tau), (rng.uniform(0.03, 0.07), rng.uniform(0.3, 0.6)))


def draw_like(scene: Scene, rng: Random) -> Scene:
    """Another scene with as many things, of which the same caption is true; everything that it leaves open is new."""
    mentions = {i: mention for mention in scene.mentions for i in mention.things}
    things: list[Thing] = []
    for i, old in enumerate(scene.things):
        asked = {n: v for n in (*ATTRIBUTES, "place") if (v := getattr(mentions.get(i), n, None)) is not None}
        things.append(_draw_asked(rng, asked, things, len(scene.things)) or old)
    background = _draw_background(rng, [t.paint for t in things])
    shadow = (rng.uniform(0.03, 0.07), rng.uniform(0.3, 0.6))
    return replace(scene, things=tuple(things), background=background, light=rng.uniform(0, math.tau), shadow=shadow)


def _draw_asked(rng: Random, asked: dict[str, str], others: list[Thing], number: int) -> Thing | None:
    """A thing of this shape, colour, fill, size and place, where they are asked for; None after 5,000 failures."""
    for _ in range(5000):
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        thing = _draw_thing(rng, asked.get("shape", shape), asked.get("colour", colour), others, number)
        if all(getattr(thing, name) == value for name, value in asked.items()):
            return thing
    return None


def _draw_thing(
    rng: Random, shape: str, colour: str, others: list[Thing], number: int, fills: Mapping[str, float] = FILLS
) -> Thing:
    size, fill = rng.choice(SIZES), rng.choices(tuple(fills), tuple(fills.values()))[0]
    radius = rng.uniform(*(_SMALL if size == "small" else _LARGE[number]))
    x, y = _free_place(rng, radius, others)
    paint = _jitter(rng, COLOURS[colour], 0.05)
    # the pattern is a paler or a darker tone of the same colour, so that its name stays right
    paler = colour in ("purple", "blue") or (colour not in ("white", "yellow") and rng.random() < 0.5)
    second = _mix(paint, (1.0, 1.0, 1.0) if paler else (0.0, 0.0, 0.0), rng.uniform(0.6, 0.75))
    return Thing(
        shape=shape,
        colour=colour,
        fill=fill,
        size=size,
        x=x,
        y=y,
        radius=radius,
        angle=rng.uniform(-_TURN, _TURN),
        paint=paint,
        second=second,
        fill_angle=_direction(fill, rng.uniform(0, math.pi)),
        fill_period=rng.uniform(*(_GRAIN if fill == "grainy" else _PERIOD)),
        fill_phase=_CENTRED.get(fill, (rng.random(), rng.random())),
        fill_seed=rng.getrandbits(31),
    )


def _direction(kind: str, angle: float) -> float:
    """``angle``, or that of a regular pattern: stripes and bands lie level or upright, all others level."""
    if kind in ("striped", "bands"):
        return math.floor(2 * angle / math.pi) % 2 * math.pi / 2
    return 0.0 if kind in ("checked", "dotted", "tiles") else angle


def _free_place(rng: Random, radius: float, others: list[Thing]) -> tuple[float, float]:
    """The first of 60 random places where at most a fifth of two radii overlaps, else the freest of them."""
    edge = 0.9 * radius  # a little may lie outside
    best, most = (0.5, 0.5), -1.0
    for _ in range(60):
        x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
        room = min((math.hypot(x - o.x, y - o.y) / (radius + o.radius) for o in others), default=1.0)
        if room > most:
            best, most = (x, y), room
        if room >= 0.8:
            break
    return best


def _draw_background(rng: Random, paints: list[RGB]) -> Background:
    first, second = (_tone(rng, paints) for _ in range(2))
    kind = rng.choices(tuple(BACKGROUNDS), tuple(BACKGROUNDS.values()))[0]
    angle, period = _direction(kind, rng.uniform(0, math.tau)), rng.uniform(0.14, 0.26)
    contrast, phase = rng.uniform(0.04, 0.09), (rng.random(), rng.random())
    if kind in ("bands", "tiles"):
        period, phase = 0.25, (0.0, 0.0)
    return Background(
        kind=kind,
        first=first,
        second=second,
        angle=angle,
        period=period,
        contrast=contrast,
        phase=phase,
        seed=rng.getrandbits(31),
    )


def _tone(rng: Random, avoid: list[RGB]) -> RGB:
    """A muted colour; of eight the first that is far from every colour in ``avoid``, else the farthest."""
    best, most = (0.5, 0.5, 0.5), -1.0
    for _ in range(8):
        tone = _mix((rng.random(), rng.random(), rng.random()), (0.55, 0.55, 0.55), 0.5)
        distance = min(math.dist(tone, other) for other in avoid)
        if distance > most:
            best, most = tone, distance
        if distance >= 0.4:
            break
    return best


def _mix(a: RGB, b: RGB, weight: float) -> RGB:
    return (a[0] + weight * (b[0] - a[0]), a[1] + weight * (b[1] - a[1]), a[2] + weight * (b[2] - a[2]))


def _jitter(rng: Random, colour: RGB, amount: float) -> RGB:
    r, g, b = (min(1.0, max(0.0, c + rng.uniform(-amount, amount))) for c in colour)
    return r, g, b
