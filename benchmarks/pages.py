"""Tables that commands write into pages of documentation, each behind its mark: ``<!-- plans pdd -->``."""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.data.files import replace_text


def where(text: str, mark: str, page: str = "The page") -> re.Match[str]:
    """Where the table of a mark stands in the text of a page, whose name is for the error.

    Raises:
        ValueError: no table stands behind the mark.
    """
    found = re.search(rf"(?s)(?<=<!-- {re.escape(mark)} -->\n\n)\|.*?\n(?=\n|$)", text)
    if found is None:
        raise ValueError(f"{page} has no table behind the mark <!-- {mark} -->: put one there.")
    return found


def put(page: Path, mark: str, table: str) -> None:
    """Replace the table of a mark.

    Raises:
        ValueError: as `where`.
    """
    text = page.read_text(encoding="utf-8")
    place = where(text, mark, page.name)
    replace_text(page, text[: place.start()] + table + text[place.end() :])
