"""The front matter of an export's README as the Hub reads it, and names of models as other people may see them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fewstep.models.families import parts_of, registry, shipped
from fewstep.students.card import Card
from fewstep.training.run_files import RunFiles

_OUR_LICENCE = "apache-2.0"  # of the models that come with this package
_HUB_LICENCES = {
    "apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0",
}  # fmt: skip
"""Those of base models that the Hub has an id for; the names of all others go with ``license: other``."""
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
_MARKUP = re.compile(r"([\\`*_\[\]<>#|~&!])")


def hub_name(base: str) -> str:
    """A base model's name on the Hub, without LoRAs; empty for a folder or file of this machine and shipped models."""
    name = parts_of(base)[0]
    local = Path(name).exists() or shipped(name) is not None or name.endswith(".safetensors")
    return "" if local or not _HUB_NAME.fullmatch(name) else name


def shown(base: str) -> str:
    """A model's name for other people: of a folder or file of this machine the last part alone."""
    name, _, loras = parts_of(base)
    parts = [hub_name(name) or one_line(Path(name).name), *(hub_name(lora) or Path(lora).name for lora in loras)]
    return " with ".join(one_line(part) for part in parts)


def one_line(text: str) -> str:
    """Text in one line that any file can hold."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def plain(text: str) -> str:
    """Text that somebody else wrote, as markdown that shows it letter by letter."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def licence_of(base: str) -> str:
    """Licence of a base model as its hub page names it; empty where it is not known here."""
    name = parts_of(base)[0]
    return _OUR_LICENCE if shipped(name) is not None else registry.licence_of(name)


def licence_words(base: str) -> str:
    """Licence of a base model; in words where it is not known here."""
    return licence_of(base) or f"that of {shown(base)}; read its card"


def licence_file(base: str) -> str:
    """Text of LICENSE.md, to which the front matter refers where the base model has no page; empty where it has."""
    if licence_of(base) or hub_name(base):
        return ""
    name = plain(shown(base))
    return f"This model is a derivative of {name}: the licence of {name} applies to it too.\n"


def front_matter(to: str, base: str, card: Card, run: Path, image: str) -> list[str]:
    """The lines between which the Hub expects a model's metadata, each value as JSON, which is YAML too.

    Args:
        run: directory with the recipe of the student. image: file of its samples, empty for none.
    """
    hub, lora = hub_name(base), to in ("lora", "kohya", "heads")
    library = "fewstep" if to == "heads" else "diffusers"
    front: dict[str, Any] = {**_licence(base, hub), "library_name": library, "pipeline_tag": "text-to-image"}
    if hub:
        front |= {"base_model": hub, "base_model_relation": "adapter" if lora else "finetune"}
    tags = ["text-to-image", "few-step", "distillation", "fewstep", one_line(card.method), *(["lora"] if lora else [])]
    front["tags"] = list(dict.fromkeys(tags))
    if image:
        front["widget"] = [{"text": "; ".join(_prompts(run)) or "samples", "output": {"url": image}}]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"]


def _licence(base: str, hub: str) -> dict[str, str]:
    name = licence_of(base)
    if name in _HUB_LICENCES:
        return {"license": name}
    link = f"https://huggingface.co/{hub}" if hub else "LICENSE.md"
    return {"license": "other", "license_name": name or "see-base-model", "license_link": link}


def _prompts(run: Path) -> Sequence[str]:
    """The prompts of the run's samples; none where its recipe is not there."""
    try:
        found = yaml.safe_load(RunFiles(run).recipe.read_text(encoding="utf-8"))["sample"]["prompts"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return ()
    return [one_line(text) for text in found if isinstance(text, str)] if isinstance(found, list) else ()
