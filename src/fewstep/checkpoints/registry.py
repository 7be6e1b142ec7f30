"""Published few-step checkpoints: what each file is, what it stands on, and its settings."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("registry.json")


@dataclass(frozen=True)
class Checkpoint:
    """A published file and how to sample from it.

    Attributes:
        id: the name users type. method: the method that trained it.
        repo, file: where it is on the hub; ``file`` is empty for a whole pipeline, or where it is not known.
        base: the model it was made for, empty if it has none. family: that model's (`Family.names`).
        kind: "lora", "lora-peft" (peft's own folder), "lora-heads" (with a head for each step), "unet" (all weights of
            the network), "pipeline", or "unet-edm".
        scheduler: class in diffusers, empty where diffusers has none; scheduler_overrides: on top of the base's config.
        steps: numbers of steps it is known to work with; default_steps: one of them. steps_exact: no others work.
        timesteps, sigmas: its own instead of a spaced grid; sigmas are those before the shift.
        guidance: "cfg", or "embedded" where the network has a guidance-scale embedding.
        guidance_scale: 1 is off; None: it has none. guidance_range: known to work, ends included.
        eta: of TCD. lora_scale: None unless it is a LoRA.
        pipeline: class in diffusers; pipeline_overrides: settings of its model_index.json, on top of the base's.
        guidance_argument: of its call. call: more arguments of its call.
        resolution: side in pixels. comfy: ComfyUI's settings, empty where unknown.
        licence: in words; commercial: whether it allows commercial use. sha256: of the file, from a third party's list.
        status: "checked", "partly" or "second-hand": how the settings are known. note: what else there is to know.
    """

    id: str
    method: str
    repo: str
    file: str
    base: str
    family: str
    kind: Literal["lora", "lora-peft", "lora-heads", "unet", "pipeline", "unet-edm"]
    scheduler: str
    steps: tuple[int, ...]
    default_steps: int
    steps_exact: bool
    resolution: int
    licence: str
    commercial: Literal["yes", "no", "ask"]
    status: Literal["checked", "partly", "second-hand"]
    scheduler_overrides: dict[str, Any] = field(default_factory=dict)
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    guidance: Literal["cfg", "embedded"] = "cfg"
    guidance_scale: float | None = None
    guidance_range: tuple[float, float] | None = None
    eta: float | None = None
    pipeline: str = "DiffusionPipeline"
    pipeline_overrides: dict[str, Any] = field(default_factory=dict)
    guidance_argument: str = "guidance_scale"
    call: dict[str, Any] = field(default_factory=dict)
    lora_scale: float | None = None
    comfy: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    note: str = ""

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA, in whatever layout."""
        return self.kind.startswith("lora")

    @property
    def flow(self) -> bool:
        """Whether it samples in flow matching's [0, 1]."""
        return self.scheduler.startswith("FlowMatch")


@cache
def checkpoints() -> dict[str, Checkpoint]:
    """Every entry by its name, in the registry's order."""
    found = {}
    for entry in json.loads(FILE.read_text(encoding="utf-8")):
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        found[entry["id"]] = Checkpoint(**values)
    return found


def find_checkpoint(name: str) -> Checkpoint:
    """The entry of that name.

    Raises:
        ValueError: one sentence that names the nearest known ones.
    """
    known = checkpoints()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`fewstep checkpoints` lists them."
    raise ValueError(f"There is no checkpoint '{name:.80}': {hint}")
