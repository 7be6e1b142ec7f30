"""Ways to break a recipe or a file, chosen by a seed."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import yaml

VALUES: tuple[Any, ...] = (
    None, "", "x", "1e-3", "scenes-64", 0, 1, -1, 2.5, 10**6, 10**30, float("nan"), float("inf"), True, [], [1, 2],
    ["a"], {}, {"a": 1}, {"name": "tcd"}, "../../etc/passwd", "\x00", "ä" * 300, [[[[]]]], {1: 2},
)  # fmt: skip


def recipe_text(source: str, rng: random.Random) -> str:
    """The YAML ``source`` with one to three things wrong with it."""
    data = yaml.safe_load(source)
    for _ in range(rng.randint(1, 3)):
        data = _tree(data, rng)
    text = yaml.safe_dump(data, allow_unicode=True) if isinstance(data, dict) else str(data)
    return _text(text, rng) if rng.random() < 0.3 else text


def _tree(data: Any, rng: random.Random) -> Any:
    data = copy.deepcopy(data)
    places = list(_places(data))
    if not places:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        parent.pop(key)
    elif kind == 1 and isinstance(parent, dict):
        parent[_misspelt(str(key), rng)] = parent.pop(key)
    elif kind == 2:
        parent[key] = {"deeper": parent[key]}
    elif kind == 3 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] *= rng.choice((-1, 0, 1e3, 1e-9, 1e18))
    else:
        parent[key] = rng.choice(VALUES)
    return data


def _places(data: Any) -> Any:
    """(container, key) of everything inside."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items):
        yield data, key
        yield from _places(value)


def _misspelt(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) + 1)
    return word[:at] + rng.choice("aeiou_-9 ") + word[at + rng.randint(0, 1) :]


def _text(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    junk = rng.choice(("{", "]", ":", "\t", "- ", "&a", "*a", "!!python/object:os.system", "\x07", "%", "\n  x", '"'))
    return rng.choice((text[:at], text[:at] + junk + text[at:], text[at:]))


def file(path: Path, rng: random.Random) -> str:
    """Break the file at ``path``; returns in words how."""
    content = path.read_bytes()
    at = rng.randrange(max(1, len(content)))
    kind = rng.choice(("missing", "empty", "cut", "flipped", "zeros", "noise", "folder", "json", "grown"))
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[:at])
    elif kind == "flipped":
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
    elif kind == "zeros":
        path.write_bytes(content[:at] + b"\0" * min(64, len(content) - at) + content[at + 64 :])
    elif kind == "noise":
        path.write_bytes(rng.randbytes(rng.randint(1, 2000)))
    elif kind == "grown":
        path.write_bytes(content + rng.randbytes(10))
    elif path.suffix in (".json", ".jsonl", ".yaml"):
        path.write_text(_changed_json(content, rng), encoding="utf-8")
    else:
        path.write_text(json.dumps(rng.choice(VALUES)), encoding="utf-8")
    return kind


def _changed_json(content: bytes, rng: random.Random) -> str:
    """One value or key inside is another one; of lines, the first's."""
    data = yaml.safe_load(content.splitlines()[0] if content.startswith(b'{"') else content)
    return json.dumps(_tree(data, rng))
