"""A self-contained HTML page: text, tables, images and line charts, in light and dark, without outside references.

This module computes; all HTML, CSS and SVG is in the template page.html.j2.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Lines of a chart: name -> points (x, y)."""


class Page:
    """The parts of a page from top to bottom, each a kind and its content; `html` renders them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[tuple[str, Any]] = []

    def heading(self, text: str) -> None:
        self.parts.append(("heading", text))

    def text(self, text: str, note: bool = False) -> None:
        self.parts.append(("note" if note else "text", text))

    def code(self, text: str) -> None:
        self.parts.append(("code", text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column holds text, the others numbers."""
        self.parts.append(("table", (head, rows)))

    def image(self, image: Image.Image, caption: str) -> None:
        """Kept inside the page as PNG."""
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        self.parts.append(("image", (base64.b64encode(file.getvalue()).decode(), caption)))

    def chart(self, series: Series, x: str, y: str, logarithmic: bool = False) -> None:
        """One line for each of ``series``; ``logarithmic`` concerns the y axis."""
        self.parts.append(("chart", Chart(series, x, y, logarithmic)))

    def html(self) -> str:
        """The whole document."""
        return _template().render(page=self)


class Chart:
    """A line chart in pixels.

    Attributes:
        lines: name -> points [(x, y)]; points that are not finite, or not positive on a logarithmic axis, are left out.
        x_ticks, y_ticks: (pixel, label).
    """

    width, height, left, bottom, top, right = 720, 300, 64, 260, 12, 550

    def __init__(self, series: Series, x: str, y: str, logarithmic: bool = False) -> None:
        self.x, self.y = x, y
        kept = {name: _plottable(points, logarithmic) for name, points in series.items()}
        values = [point for points in kept.values() for point in points]
        self.lines: dict[str, list[tuple[float, float]]] = {}
        if values:
            across = _Axis([a for a, _ in values], self.left, self.right)
            up = _Axis([b for _, b in values], self.bottom, self.top)
            self.lines = {
                name: [(across.at(a), up.at(b)) for a, b in points] for name, points in kept.items() if points
            }
            self.x_ticks = [(across.at(value), f"{value:g}") for value in across.ticks()]
            self.y_ticks = [(up.at(v), f"{10**v:.2g}" if logarithmic else f"{v:g}") for v in up.ticks()]


def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    rules = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return rules.get_template("page.html.j2")


def _plottable(points: Sequence[tuple[float, float]], logarithmic: bool) -> list[tuple[float, float]]:
    kept = [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b) and (b > 0 or not logarithmic)]
    return [(a, math.log10(b)) for a, b in kept] if logarithmic else kept


class _Axis:
    """Maps values to pixels, and knows round numbers to label."""

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
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]
