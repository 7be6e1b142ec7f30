"""Tables of figures: as text for a terminal, and as Markdown."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fewstep.evaluation.figures import SHORT, figure
from fewstep.evaluation.result import Comparison


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first column names the rows, and an empty cell says that nothing applies."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def without_empty(self) -> Table:
        """The table without columns in which nothing applies."""
        kept = [0, *(i for i in range(1, len(self.head)) if any(row[i] for row in self.rows))]
        return Table([self.head[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def as_markdown(self) -> str:
        """Lines of Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

    def as_text(self, width: int | None = None) -> str:
        """Columns of text, in several blocks below each other where ``width`` (the terminal's) does not hold them."""
        width = width or _width()
        lines = [self.head, *self.rows]
        most = max(16, width // 2 - 4)
        names = [textwrap.wrap(line[0], most) or [""] for line in lines]
        first = max(len(part) for name in names for part in name)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        return "\n\n".join(
            "\n".join(_line(name, [line[i].rjust(widths[i]) for i in block], first)
                      for name, line in zip(names, lines, strict=True))
            for block in _blocks(widths, width - first)
        )  # fmt: skip


def _line(name: list[str], cells: list[str], first: int) -> str:
    """A row: its name, which may take several lines, with the cells beside the first one."""
    return "\n".join(["  ".join([name[0].ljust(first), *cells]).rstrip(), *(f"  {more}" for more in name[1:])])


def _blocks(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Columns but the first, as many together as the room holds, two spaces before each."""
    block: list[int] = []
    for i in range(1, len(widths)):
        if block and sum(widths[j] + 2 for j in [*block, i]) > room:
            yield block
            block = []
        block.append(i)
    yield block


def figure_table(comparison: Comparison, names: Iterable[str], digits: int = 3) -> Table:
    """Figures with their intervals, a row for each result; below them as many real images, the floor."""
    shown, floors = [name for name in names if name in comparison.names], comparison.floors
    rows = [[r.label, *(r.in_words(n, digits) if n in r.figures else "" for n in shown)] for r in comparison.results]
    if floors.keys() & set(shown):
        rows.append(["real images (floor)", *(f"{floors[n]:.{digits}g}" if n in floors else "" for n in shown)])
    return Table(["", *shown], rows)


def as_text(comparison: Comparison, names: Sequence[str] = SHORT) -> str:
    """The figures in columns, with 95 % intervals, and below them a line that explains each."""
    table = figure_table(comparison, names)
    about = f"Over {comparison.count} {comparison.about}; 95 % intervals in brackets:"
    return "\n".join([table.as_text(), "", *in_lines(about), *meanings(table.head[1:])])


def meanings(names: Iterable[str]) -> list[str]:
    """What figures say, in lines for a terminal."""
    return [line for name in names for line in in_lines(f"  {name}: {figure(name)}", hang=4)]


def in_lines(text: str, hang: int = 0) -> list[str]:
    """A sentence in lines for a terminal, all but the first indented by ``hang``."""
    return textwrap.wrap(text, _width(), subsequent_indent=" " * hang)


def _width() -> int:
    """Columns of the terminal, 80 where there is none."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)
