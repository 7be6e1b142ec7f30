"""The scale of each layer: alpha / rank, with alpha in the file's tensors, its header, or peft's config beside it.

peft's rank-stabilised LoRA has alpha / sqrt(rank). Ranks are those of the tensors: nothing in a header is trusted but
alpha (a rank of a billion there would be allocated by those who believe it).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.models.lora_files.files import ADAPTER_CONFIG
from fewstep.models.lora_files.keys import Parts

PEFT = "base_model.model."
"""peft's own files have this before every name."""
_NOT_PEFTS = re.compile(r"base_model\.model\.(double|single)_blocks\.")  # fal's trainer of FLUX, without alpha
_HEADER = "lora_adapter_metadata"
_MOST = 1e4
_OF_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base's weights as well

Settings = Mapping[str, Any]
"""peft's config of one part of a pipeline."""


def peft_settings(path: Path, names: list[str], metadata: Mapping[str, str], parts: Parts) -> dict[str, Settings]:
    """part -> peft's settings for it: from `adapter_config.json` beside a file of peft's own, or the file's header.

    A header's settings have their part's name before each, or are the network's (diffusers' `save_lora_adapter`).

    Raises:
        ValueError: one sentence: the config is not there, damaged, or of a kind that is not supported.
    """
    has_config = path.with_name(ADAPTER_CONFIG).is_file() or not any(map(_NOT_PEFTS.match, names))
    if any(name.startswith(PEFT) for name in names) and has_config:
        return {next(iter(parts)): _checked(_beside(path), path)}
    if metadata.get(_HEADER) is None:
        return {}
    try:
        settings = json.loads(metadata[_HEADER])
        if not isinstance(settings, dict):
            raise ValueError("it is no table")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The LoRA {path} cannot be read: its metadata is damaged ({error}).") from None
    found = {part: {k.removeprefix(f"{part}."): v for k, v in settings.items() if k.startswith(f"{part}.")}
             for part in parts}  # fmt: skip
    if settings.keys() & {"r", "lora_alpha", "alpha"}:
        found[next(iter(parts))] = settings
    return {part: _checked(own, path) for part, own in found.items() if own}


def _beside(path: Path) -> Any:
    try:
        return json.loads(path.with_name(ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(
            f"The LoRA {path} is in peft's own layout: adapter_config.json, which holds its scale, is not beside it."
        ) from None


def _checked(settings: Any, path: Path) -> Settings:
    """The settings, if what they describe is known here; raises as `peft_settings`."""
    if not isinstance(settings, dict):
        raise ValueError(f"The LoRA {path} cannot be read: its {ADAPTER_CONFIG} is damaged.")
    kind, begun = settings.get("peft_type") or "LORA", settings.get("init_lora_weights")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise ValueError(f"The file {path} is of peft's kind {kind}, which is not supported: a LoRA, LoHa or LoKr is.")
    if isinstance(begun, str) and begun.lower().startswith(_OF_BASE):
        raise ValueError(
            f"The LoRA {path} was initialised by {begun}, which changes the base's weights too: let peft convert it "
            "into a plain LoRA (path_initial_model_for_weight_conversion)."
        )
    return settings


def peft_scale(settings: Settings, layer: str, rank: int | None) -> float:
    """The scale of one layer by peft's settings; 1 where they have no alpha.

    Args:
        layer: its name in the network. rank: of its tensors; None where they have none (a LoKr of two full factors).

    Raises:
        ValueError: one sentence when they are damaged.
    """
    try:
        alpha = _setting(settings, "alpha_pattern", layer, settings.get("lora_alpha", settings.get("alpha")))
        size = _setting(settings, "rank_pattern", layer, settings.get("r")) if rank is None else rank
        if alpha is None or size is None:
            return 1.0
        return checked_scale(float(alpha) / (math.sqrt(size) if settings.get("use_rslora") else size))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, OverflowError, re.error) as error:
        raise ValueError(f"its metadata is damaged ({error})") from None


def _setting(settings: Settings, patterns: str, layer: str, otherwise: Any) -> Any:
    """The value of the first pattern that the layer's name matches."""
    values = settings.get(patterns) or {}
    matched = next((key for key in values if _matches(str(key), layer)), None)
    return otherwise if matched is None else values[matched]


def checked_scale(scale: float) -> float:
    """``scale``, if it is a believable one.

    Raises:
        ValueError: it is not finite, or beyond all measure.
    """
    if not (math.isfinite(scale) and abs(scale) < _MOST):
        raise ValueError("its alpha is absurd")
    return scale


def _matches(pattern: str, layer: str) -> bool:
    """As peft matches a pattern: an expression for the end of the name, from a dot on.

    Raises:
        ValueError: an expression that a stranger may have made to run for ever.
    """
    choices = len(re.findall(r"[*+?{(]", pattern))  # each may be tried for each length of the others
    if len(pattern) > 200 or re.search(r"\)[*+?{]", pattern) or choices > 4:
        raise ValueError(f"the pattern {pattern:.40} is no layer's name")
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None
