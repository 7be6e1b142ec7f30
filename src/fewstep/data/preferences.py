"""Preferences: pairs of images of one prompt, one of which people chose; a folder with ``preferences.jsonl``.

=============  =====================================================================================================
layout         columns
=============  =====================================================================================================
plain          ``prompt``, ``chosen``, ``rejected``
Pick-a-Pic     ``caption``, ``jpg_0``, ``jpg_1``, ``label_0`` (1: the first was chosen, 0: the second, 0.5: a tie)
HPDv2          ``prompt``, ``image_path`` (two of them), ``human_preference`` ([1, 0] or [0, 1])
=============  =====================================================================================================

Each line is one choice. Images are named relative to the folder and lie in it. Ties are left out. Other columns are
ignored, except ``probability``: how likely the choice was, where simulated raters state it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.images import inside

FILE = "preferences.jsonl"
_LONGEST = 100_000  # characters of a line


@dataclass(frozen=True)
class Preference:
    """One choice.

    Attributes:
        prompt: of both images.
        chosen, rejected: their files.
        probability: how likely the choice was, where that is known.
    """

    prompt: str
    chosen: Path
    rejected: Path
    probability: float | None = None


@dataclass(frozen=True)
class Preferences:
    """All choices of a folder, in their order, and how many ties were left out."""

    choices: tuple[Preference, ...]
    ties: int = 0


def read_preferences(folder: Path) -> Preferences:
    """The choices in ``folder``.

    Raises:
        ValueError: one sentence that names the line: there is no such folder or list, a line is of none of the layouts,
            an image is missing or outside the folder.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"There are no preferences in '{folder}': it must hold {FILE}.")
    found, ties, root = [], 0, folder.resolve()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # texts may hold other separators of lines
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8: save it anew.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        choice = _choice(line, root, f"Line {number} of {file}")
        ties += choice is None
        found += [] if choice is None else [choice]
    if not found:
        raise ValueError(f"{file} holds no choice to learn from.")
    return Preferences(tuple(found), ties)


def _choice(line: str, root: Path, where: str) -> Preference | None:
    try:
        entry = json.loads(line) if len(line) <= _LONGEST else None
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no JSON object of a choice.")
    prompt, images, label = _columns(entry, where)
    if label == 0.5:
        return None
    first, second = (_inside(root, name, where) for name in images)
    if first == second:
        raise ValueError(f"{where} chooses between an image and itself.")
    chosen, rejected = (first, second) if label == 1 else (second, first)
    return Preference(prompt, chosen, rejected, _probability(entry.get("probability"), where))


def _columns(entry: Mapping[str, Any], where: str) -> tuple[str, tuple[Any, Any], float]:
    """(prompt, both images, 1 where the first was chosen, 0 or 0.5 for a tie), by any of the layouts."""
    if {"prompt", "chosen", "rejected"} <= entry.keys():
        prompt, images, label = entry["prompt"], (entry["chosen"], entry["rejected"]), 1
    elif {"caption", "jpg_0", "jpg_1", "label_0"} <= entry.keys():
        prompt, images, label = entry["caption"], (entry["jpg_0"], entry["jpg_1"]), entry["label_0"]
    elif {"prompt", "image_path", "human_preference"} <= entry.keys():
        prompt, paths, votes = (entry[key] for key in ("prompt", "image_path", "human_preference"))
        if not (isinstance(paths, list) and len(paths) == 2) or votes not in ([1, 0], [0, 1]):
            raise ValueError(f"{where} must have two image_path, and human_preference [1, 0] or [0, 1].")
        images, label = (paths[0], paths[1]), votes[0]
    else:
        raise ValueError(
            f"{where} must have prompt, chosen and rejected, or the columns of Pick-a-Pic (caption, jpg_0, jpg_1, "
            "label_0) or HPDv2 (prompt, image_path, human_preference)."
        )
    if not isinstance(prompt, str):
        raise ValueError(f"{where} has a prompt that is no text.")
    if isinstance(label, bool) or label not in (0, 0.5, 1):
        raise ValueError(f"{where} has a label_0 that is none of 1, 0 and 0.5.")
    return prompt, images, float(label)


def _inside(root: Path, name: Any, where: str) -> Path:
    """The image of that name in ``root``, wherever links lead."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where} must name its images' files, as text.")
    try:
        return inside(root, name).resolve()
    except ValueError as error:
        raise ValueError(f"{where} names {name!r:.80}: {error}.") from None


def _probability(given: Any, where: str) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1 or math.isnan(given):
        raise ValueError(f"{where} has a probability that is no number from 0 to 1.")
    return float(given)
