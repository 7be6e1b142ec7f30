"""The result of a verification: one row per quantity, with the truth, the measurement, its floor and its limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One verified quantity; it passes when ``|measured - truth| <= limit``.

    Attributes:
        quantity: what was measured.
        truth: its exact value.
        measured: what came out.
        limit: how far from the truth it may be.
        floor: how far even a perfect student would be (sampling noise, the solver's own error), if known.
    """

    quantity: str
    truth: float
    measured: float
    limit: float
    floor: float | None = None

    @property
    def passed(self) -> bool:
        return abs(self.measured - self.truth) <= self.limit  # False for NaN


@dataclass
class Report:
    """The rows of one method on one teacher.

    Attributes:
        method: its name. about: teacher, grid, seed and cost in words.
    """

    method: str
    about: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are rows, and all of them pass."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, quantity: str) -> Row:
        """The row of that name; KeyError when there is none."""
        for row in self.rows:
            if row.quantity == quantity:
                return row
        raise KeyError(f"No quantity '{quantity}': there are {', '.join(row.quantity for row in self.rows)}.")

    def __str__(self) -> str:
        heads = ("quantity", "truth", "measured", "floor", "limit", "pass")
        lines = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        text = [f"{self.method}: {self.about}"] if self.about else [self.method]
        for line in lines:
            others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join([line[0].ljust(widths[0]), *others]))
        return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    floor = "" if row.floor is None else _number(row.floor)
    passed = "yes" if row.passed else "NO"
    return row.quantity, _number(row.truth), _number(row.measured), floor, f"± {_number(row.limit)}", passed


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.4g}"
