"""Rendering: signed distances, anti-aliased over one pixel, with patterns, soft shadows and backgrounds.

Everything is float32 and one image at a time: a thing touches only a patch around itself, so an image costs about
half a millisecond and cannot depend on its neighbours in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fewstep.scenes64.scenes.content import Background, Scene, Thing

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_SOFT = 2.2  # half width of a shadow's edge at 64 pixels


def render(scene: Scene, size: int = 64) -> Bytes:
    """The image of a scene, uint8 [size, size, 3]."""
    canvas = _background(scene.background, size)
    for thing in scene.things:
        _render_thing(canvas, thing, scene)
    np.clip(canvas, 0.0, 1.0, out=canvas)
    return (canvas * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def _render_thing(canvas: Array, thing: Thing, scene: Scene) -> None:
    """Shadow, then the thing itself, on canvas [3, size, size]."""
    size = canvas.shape[1]
    scale = size / 64
    reach = thing.radius * size * 1.05 + scene.shadow[0] * size + (_SOFT + 1) * scale
    columns, rows = _span(thing.x * size, reach, size), _span(thing.y * size, reach, size)
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] + np.float32(0.5 - thing.x * size)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - thing.y * size)
    patch = canvas[:, rows, columns]
    light = np.float32(math.cos(scene.light)), np.float32(math.sin(scene.light))
    fall = np.float32(scene.shadow[0] * size)

    shadow = _distance(thing, x - fall * light[0], y - fall * light[1], size)
    patch *= 1 - np.float32(scene.shadow[1]) * _step(shadow / np.float32(2 * _SOFT * scale))
    cover = _step(_distance(thing, x, y, size))
    shade = 1 - np.float32(0.16 / (thing.radius * size)) * (x * light[0] + y * light[1])
    colour = _fill(thing, x, y, size)
    patch += cover * (colour * shade - patch)


def _span(centre: float, reach: float, size: int) -> slice:
    return slice(max(0, math.floor(centre - reach)), min(size, math.ceil(centre + reach)))


def _step(distance: Array) -> Array:
    """1 inside, 0 outside, smooth over one unit of distance."""
    a = np.clip(np.float32(0.5) - distance, 0.0, 1.0)
    return a * a * (3 - 2 * a)


def _turn(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return c * x + s * y, c * y - s * x


# ---------------------------------------------------------------- shapes: signed distance in units of the radius


def _distance(thing: Thing, x: Array, y: Array, size: int) -> Array:
    """Signed distance in pixels, negative inside."""
    radius = np.float32(thing.radius * size)
    u, v = _turn(x / radius, y / radius, thing.angle)
    return _SHAPES[thing.shape](u, v) * radius


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(0.95)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.8)


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) * np.float32(0.866) - y * np.float32(0.5), y) - np.float32(0.55)


def _star(x: Array, y: Array) -> Array:
    """Five points: fold into one tenth, then the distance to the line from tip to notch."""
    tenth = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + np.float32(tenth + math.tau)) % np.float32(2 * tenth) - np.float32(tenth))
    r = np.hypot(x, y)
    tip, notch = 1.08, (0.5 * math.cos(tenth), 0.5 * math.sin(tenth))
    length = math.hypot(tip - notch[0], notch[1])
    normal = notch[1] / length, (tip - notch[0]) / length
    return r * (np.cos(angle) * np.float32(normal[0]) + np.sin(angle) * np.float32(normal[1])) - np.float32(
        tip * normal[0]
    )


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - np.float32(0.74)) - np.float32(0.26)


def _heart(x: Array, y: Array) -> Array:
    """Two discs over a corner, in the heart's own units (1.7 of them to the radius)."""
    a, b = np.abs(x) * np.float32(0.6), np.float32(0.55) - y * np.float32(0.6)
    disc = np.hypot(a - np.float32(0.25), b - np.float32(0.75)) - np.float32(0.3536)
    corner = np.maximum((a - b) * np.float32(0.7071), (a + b - 1) * np.float32(0.7071))
    return np.minimum(disc, corner) / np.float32(0.6)


_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
    "ring": _ring, "heart": _heart,
}  # fmt: skip


# ---------------------------------------------------------------- fills


def _fill(thing: Thing, x: Array, y: Array, size: int) -> Array:
    """Colour of a thing's surface, [3, h, w] or [3, 1, 1]."""
    paint = np.asarray(thing.paint, dtype=np.float32)[:, None, None]
    if thing.fill == "plain":
        return paint
    period = np.float32(thing.fill_period * size)
    u, v = _turn(x / period, y / period, thing.fill_angle)
    u, v = u + np.float32(thing.fill_phase[0]), v + np.float32(thing.fill_phase[1])
    pattern = _PATTERNS[thing.fill](u, v, period, thing.fill_seed)
    return paint + pattern * (np.asarray(thing.second, dtype=np.float32)[:, None, None] - paint)


def _wave(u: Array) -> Array:
    """Distance from the middle of each period, in periods: 0 ... 1/2."""
    return np.abs(u - np.floor(u) - np.float32(0.5))


def _stripes(u: Array, v: Array, period: np.float32, seed: int) -> Array:
    return _step((_wave(u) - np.float32(0.25)) * period)


def _checks(u: Array, v: Array, period: np.float32, seed: int) -> Array:
    s = (_wave(u * np.float32(0.8)) - np.float32(0.25)) * 4
    t = (_wave(v * np.float32(0.8)) - np.float32(0.25)) * 4
    return _step(s * t * period * np.float32(0.3))


def _dots(u: Array, v: Array, period: np.float32, seed: int) -> Array:
    return _step((np.hypot(_wave(u), _wave(v)) - np.float32(0.3)) * period)


def _grain(u: Array, v: Array, period: np.float32, seed: int) -> Array:
    """A third of the cells of a fine grid, at random."""
    return (_noise(u, v, seed) < np.float32(0.36)).astype(np.float32)


_PATTERNS: dict[str, Callable[[Array, Array, np.float32, int], Array]] = {
    "striped": _stripes, "checked": _checks, "dotted": _dots, "grainy": _grain,
}  # fmt: skip


def _noise(u: Array, v: Array, seed: int) -> Array:
    """A number in [0, 1) for each whole cell of (u, v): integer hashing, the same on every machine."""
    i, j = (np.floor(w).astype(np.int64).astype(np.uint32) for w in (u, v))
    h = i * np.uint32(0x9E3779B1) ^ j * np.uint32(0x85EBCA77) ^ np.uint32(seed)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39)
    return ((h ^ (h >> np.uint32(15))) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


# ---------------------------------------------------------------- backgrounds


def _background(background: Background, size: int) -> Array:
    """[3, size, size]: a gradient, straight or round, under a faint pattern."""
    x = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size))[None]
    y = x.T
    first, second = (np.asarray(c, dtype=np.float32)[:, None, None] for c in (background.first, background.second))
    u, v = _turn(x - np.float32(0.5), y - np.float32(0.5), background.angle)
    if background.kind == "glow":
        px, py = background.phase
        blend = np.clip(np.hypot(x - np.float32(px), y - np.float32(py)), 0.0, 1.0)
    else:
        blend = np.clip(u * np.float32(0.8) + np.float32(0.5), 0.0, 1.0)
    tone = first + blend * (second - first)
    if background.kind in ("gradient", "glow"):
        return tone
    period = np.float32(background.period)
    u, v = u / period + np.float32(background.phase[0]), v / period + np.float32(background.phase[1])
    return tone + np.float32(background.contrast) * (_BACKGROUNDS[background.kind](u, v, period, background) - 0.5) * 2


def _bands(u: Array, v: Array, period: np.float32, background: Background) -> Array:
    return _step((_wave(v) - np.float32(0.25)) * period * 64)


def _tiles(u: Array, v: Array, period: np.float32, background: Background) -> Array:
    return _step((_wave(u) - np.float32(0.25)) * (_wave(v) - np.float32(0.25)) * period * 256)


def _clouds(u: Array, v: Array, period: np.float32, background: Background) -> Array:
    """Value noise: random corners of a grid, joined smoothly."""
    fu, fv = u - np.floor(u), v - np.floor(v)
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    low = _noise(u, v, background.seed), _noise(u + 1, v, background.seed)
    high = _noise(u, v + 1, background.seed), _noise(u + 1, v + 1, background.seed)
    bottom, top = low[0] + fu * (low[1] - low[0]), high[0] + fu * (high[1] - high[0])
    return bottom + fv * (top - bottom)


_BACKGROUNDS: dict[str, Callable[[Array, Array, np.float32, Background], Array]] = {
    "bands": _bands, "tiles": _tiles, "clouds": _clouds,
}  # fmt: skip
