"""A self-contained HTML page: text, tables, pictures and line charts, light and dark, without outside references."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

Series = Mapping[str, Sequence[tuple[float, float]]]

_STYLE = """
:root { --paper: #fcfcfb; --ink: #1c1c1a; --faint: #70706a; --line: #dcdcd6;
        --c0: #1f6feb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #b08900; --c5: #0b7285; }
@media (prefers-color-scheme: dark) {
:root { --paper: #16171a; --ink: #e8e8e4; --faint: #9a9a94; --line: #34363b;
        --c0: #6ea8fe; --c1: #ff922b; --c2: #69db7c; --c3: #da77f2; --c4: #ffd43b; --c5: #3bc9db; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 70rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
p.note, figcaption, th { color: var(--faint); } figure { margin: 1rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; image-rendering: pixelated; background: #fff; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } div.scroll { overflow-x: auto; }
td, th { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
pre { background: color-mix(in srgb, var(--ink) 6%, var(--paper)); padding: 1rem; overflow-x: auto; }
svg text { fill: var(--faint); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--line); fill: none; }
"""


class Page:
    """Collects parts from top to bottom; `html` joins them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, note: bool = False) -> None:
        self._parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others numbers."""
        lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        self._parts.append(f'<div class="scroll"><table>{"".join(lines)}</table></div>')

    def picture(self, image: Image.Image, caption: str = "") -> None:
        """Kept inside the page as PNG."""
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        alt = escape(caption or "picture")
        self._parts.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def chart(self, series: Series, x: str, y: str, logarithmic: bool = False) -> None:
        """One line per series of (x, y) points; points that cannot be drawn are left out."""
        self._parts.append(f"<figure>{line_chart(series, x, y, logarithmic)}</figure>")

    def html(self) -> str:
        """The whole document."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body>{''.join(self._parts)}</body></html>"
        )


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 300, 64, 40, 12, 170


def line_chart(series: Series, x: str, y: str, logarithmic: bool = False) -> str:
    """An inline SVG with axes, ticks and a legend; ``logarithmic`` is of the y axis."""
    drawn = {name: _drawable(points, logarithmic) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return "<p class=note>Nothing to draw yet.</p>"
    every = [point for points in drawn.values() for point in points]
    across = _Axis([p[0] for p in every], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([p[1] for p in every], _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y)} over {escape(x)}">']
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{right}"/>')
    for value in across.ticks():
        parts.append(f'<text x="{across.at(value):.1f}" y="{floor + 16}" text-anchor="middle">{value:g}</text>')
    for value in up.ticks():
        label = f"{10**value:.2g}" if logarithmic else f"{value:g}"
        parts.append(f'<text x="{_LEFT - 6}" y="{up.at(value) + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    for i, (name, points) in enumerate(drawn.items()):
        colour = f"var(--c{i % 6})"
        path = "L".join(f"{across.at(px):.1f} {up.at(py):.1f}" for px, py in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(points) < 12:
            parts += [f'<circle cx="{across.at(a):.1f}" cy="{up.at(b):.1f}" r="3" fill="{colour}"/>' for a, b in points]
        level = _TOP + 10 + 18 * i
        parts.append(f'<path d="M{right + 12} {level - 4}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{right + 36}" y="{level}">{escape(name)}</text>')
    return "".join(parts) + "</svg>"


def _drawable(points: Sequence[tuple[float, float]], logarithmic: bool) -> list[tuple[float, float]]:
    kept = [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b) and (b > 0 or not logarithmic)]
    return [(a, math.log10(b)) for a, b in kept] if logarithmic else kept


class _Axis:
    """Maps values to pixels, and knows round numbers to mark."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        self.low, self.high = min(values), max(values)
        if self.high == self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.first, self.last = first, last

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Three to seven multiples of 1, 2 or 5 times a power of ten."""
        raw = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9)
        return [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count + 1)]
