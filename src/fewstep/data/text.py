"""Text that people wrote: UTF-8, with a byte-order mark or without, in lines that end at a line feed alone.

Other separators (U+2028, vertical tab, form feed, U+0085) are part of a caption; `str.splitlines` would cut it there.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewstep.data.entries import Unusable

MAX_TEXT = 2**20  # bytes of a caption, or of the file that holds it
CAPTION_KEYS = ("text", "caption", "prompt")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How files begin that spreadsheets and editors save as "Unicode"."""


def decoded(data: bytes) -> str:
    """UTF-8 as text, without the byte-order mark that some editors write.

    Raises:
        Unusable: it is in another encoding.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unusable("it is not text in UTF-8") from None


def lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that hold more than space."""
    return ((number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip())


def caption_of(text: Any) -> str:
    """A caption without surrounding space, NUL and byte-order mark.

    Raises:
        Unusable: it is empty, too long to be a caption, or no text.
    """
    if text is None:
        raise Unusable("it has no caption")
    if not isinstance(text, str | bytes):
        raise Unusable(f"its caption is no text, but {text!r:.40}")
    if len(text) > MAX_TEXT:
        raise Unusable("its caption is longer than a megabyte")
    try:
        read = text.decode() if isinstance(text, bytes) else text
        read.encode()  # JSON can spell half a character, which no tokenizer takes
    except UnicodeError:
        raise Unusable("its caption is not text in UTF-8") from None
    caption = read.removeprefix("\ufeff").replace("\0", "").strip()
    if not any(map(str.isprintable, caption)):  # zero-width characters alone are no caption
        raise Unusable("it has no caption")
    return caption


def caption_among(entry: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The caption under the first of ``keys`` that holds text.

    Raises:
        Unusable: as `caption_of`.
    """
    given = [entry[key] for key in keys if entry.get(key) is not None]
    return caption_of(next((text for text in given if isinstance(text, str) and text.strip()), (given or [None])[0]))


def caption_keys(column: str | None) -> tuple[str, ...]:
    """The names under which a caption is looked for: ``column`` alone if it is given."""
    return CAPTION_KEYS if column is None else (column,)


def caption_in(text: bytes, column: str | None = None) -> str:
    """The caption in a JSON object.

    Raises:
        Unusable: there is none.
    """
    try:
        entry = json.loads(decoded(text))
    except (ValueError, RecursionError):
        raise Unusable("its JSON is damaged") from None
    keys = caption_keys(column)
    if not isinstance(entry, dict) or all(entry.get(key) is None for key in keys):
        raise Unusable(f"its JSON has no text by the name of {' or '.join(keys)}")
    return caption_among(entry, keys)
