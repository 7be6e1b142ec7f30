"""A self-contained HTML page: text, tables, images and line charts, in light and dark, without outside references.

This module computes; all HTML, CSS and SVG is in the template page.html.j2.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image
from torch import Tensor

from fewstep.evaluation.figures import Figure
from fewstep.evaluation.grids import ON_PAGES, to_images
from fewstep.evaluation.tables import Table

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Lines of a chart: name -> points (x, y)."""
LOSSLESS = 128
"""Images of a larger side are kept as JPEG."""


class Page:
    """The parts of a page from top to bottom, each a kind and its content; `html` renders them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[tuple[str, Any]] = []

    def heading(self, text: str) -> None:
        self.parts.append(("heading", text))

    def text(self, text: str, note: bool = False) -> None:
        self.parts.append(("note" if note else "text", text))

    def verdict(self, about: str, sentences: Sequence[str]) -> None:
        """What was reached, before everything else."""
        self.parts.append(("verdict", (about, sentences)))

    def code(self, text: str) -> None:
        self.parts.append(("code", text))

    def folded(self, page: Page) -> None:
        """The parts of another page under its title, to be unfolded; nothing where it has none."""
        if page.parts:
            self.parts.append(("folded", page))

    def table(self, table: Table, meaning: Callable[[str], Figure] | None = None, explained: bool = False) -> None:
        """A table without the columns that are empty; nothing where no column is left.

        Args:
            meaning: what a column says, in tables of figures; without it the cells are text.
            explained: whether a list below says it, too.
        """
        table = table.without_empty()
        if len(table.head) > 1:
            columns = [None, *(meaning(name) if meaning else None for name in table.head[1:])]
            self.parts.append(("table", (table, columns, explained)))

    def images(
        self, caption: str, head: Sequence[str], rows: Mapping[str, Sequence[tuple[str, Tensor] | None]]
    ) -> None:
        """Images of one prompt in rows with names, the first row above ``head``; each with its label, None for a gap.

        Args:
            rows: images [3, H, W] in [0, 1].
        """
        kept = {name: [one and (one[0], _inline(one[1])) for one in row] for name, row in rows.items()}
        self._append("grids", (caption, head, kept))

    def chart(self, series: Series, x: str, y: str, logarithmic: bool = False) -> None:
        """One line for each of ``series``; ``logarithmic`` concerns the y axis."""
        self._append("charts", Chart(series, x, y, logarithmic))

    def _append(self, kind: str, content: object) -> None:
        """Put charts, or images, that follow each other side by side where there is room."""
        if not self.parts or self.parts[-1][0] != kind:
            self.parts.append((kind, []))
        self.parts[-1][1].append(content)

    def html(self) -> str:
        """The whole document."""
        return _template().render(page=self)


def _inline(image: Tensor) -> str:
    """An image [3, H, W] in [0, 1] as the address of itself, reduced to what a page shows."""
    (picture,) = to_images(image[None])
    picture.thumbnail((ON_PAGES, ON_PAGES), Image.Resampling.LANCZOS)
    kind, options = ("PNG", {"optimize": True}) if max(picture.size) <= LOSSLESS else ("JPEG", {"quality": 90})
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


class Chart:
    """A line chart in pixels.

    Attributes:
        lines: name -> points [(x, y)]; points that are not finite, or not positive on a logarithmic axis, are left out.
        x_ticks, y_ticks: (pixel, label).
    """

    width, height, left, bottom, top, right = 350, 220, 56, 180, 10, 340

    def __init__(self, series: Series, x: str, y: str, logarithmic: bool = False) -> None:
        self.x, self.y = x, y
        kept = {name: _plottable(points, logarithmic) for name, points in series.items()}
        values = [point for points in kept.values() for point in points]
        self.lines: dict[str, list[tuple[float, float]]] = {}
        if values:
            across = _Axis([a for a, _ in values], self.left + 6, self.right - 6)
            up = _Axis([b for _, b in values], self.bottom - 6, self.top + 6)
            self.lines = {
                name: [(across.at(a), up.at(b)) for a, b in points] for name, points in kept.items() if points
            }
            self.x_ticks = [(across.at(value), f"{value:g}") for value in across.ticks()]
            self.y_ticks = [(up.at(v), f"{float(f'{10**v:.2g}'):g}" if logarithmic else f"{v:g}") for v in up.ticks()]


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
