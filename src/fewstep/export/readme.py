"""The README beside an export: what it is, the lines that use it, what was measured, whose licence binds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.export.scheduler import SchedulerPlan
from fewstep.models.families import shipped
from fewstep.students.student import Card
from fewstep.training.run_files import RunFiles

BASE_LICENCES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "scenes-64": "apache-2.0",
}
"""Licences of base models as their hub pages name them."""

_COMFY = {"lcm": "sampler lcm", "tcd": "ComfyUI-TCD's sampler", "euler-ancestral": "sampler euler_ancestral"}
_SCHEDULES = {"lcm": "sgm_uniform with ModelSamplingDiscrete lcm", "tcd": "its own"}


def licence_of(base: str) -> str:
    """Of a base model; in words where it is not known here."""
    return BASE_LICENCES.get(base, f"that of {base}; read its card")


def usage_hint(card: Card, plan: SchedulerPlan) -> str:
    """ComfyUI's settings in a line: programs show it with the file."""
    even = plan.scheduler == "LCMScheduler" and plan.config.get("original_inference_steps") != 50
    schedule = "sgm_uniform" if even else _SCHEDULES.get(card.sampler, "sgm_uniform")
    if "timesteps" in plan.call:  # which its schedules cannot be told
        schedule = f"the sigmas of timesteps {', '.join(f'{t:g}' for t in plan.call['timesteps'])}"
    words = [f"{card.num_inference_steps} steps", f"cfg {card.guidance_scale:g}", _COMFY.get(card.sampler, "euler")]
    return ", ".join([*words, schedule, *([f"eta {card.eta:g}"] if card.sampler == "tcd" else [])])


def code(to: str, base: str, file: str, network: str, card: Card, plan: SchedulerPlan) -> str:
    """The lines of Python that the export is meant for.

    Args:
        file: the LoRA's name. network: class of the network.
    """
    here, draws = '"THIS_FOLDER"', f'image = pipe("a prompt", {call(card, plan)}).images[0]'
    if to == "diffusers":
        return "\n".join([
            "from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline.from_pretrained({here})", draws,
        ])  # fmt: skip
    names, place = ["DiffusionPipeline", plan.scheduler], f'"{base}"'
    if to == "merged":
        part = "unet" if network.startswith("UNet") else "transformer"
        names, put = [*names, network], f"pipe.{part} = {network}.from_pretrained({here})"
    else:
        put = f'pipe.load_lora_weights({here}, weight_name="{file}")'
    lines = [f"from diffusers import {', '.join(sorted(names))}"]
    if shipped(base) is not None:
        lines, place = [*lines, "from fewstep.models.families import shipped"], f'shipped("{base}")'
    return "\n".join([
        *lines, "", f"pipe = DiffusionPipeline.from_pretrained({place})", put,
        f'pipe.scheduler = {plan.scheduler}.from_pretrained({here}, subfolder="scheduler")', draws,
    ])  # fmt: skip


def call(card: Card, plan: SchedulerPlan) -> str:
    """Arguments of the pipeline's call."""
    told = dict(plan.call)
    if not told.keys() & {"timesteps", "sigmas"}:
        told = {"num_inference_steps": card.num_inference_steps, **told}
    return ", ".join(f"{key}={value!r}" for key, value in told.items())


def measured(run: Path) -> str:
    """What `evaluate` measured during the run, in words."""
    file = RunFiles(run).evaluations
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not lines:
        return "Not measured while it was trained; `fewstep report` measures a run."
    figures = {k: v for k, v in lines[-1].items() if k != "step" and isinstance(v, int | float)}
    said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return f"At step {lines[-1]['step']} of its training, on unseen prompts: {said}."


def readme(
    to: str, title: str, base: str, lines_of_code: str, card: Card, plan: SchedulerPlan, run: Path, proof: str,
    remarks: list[str], picture: bool,
) -> str:  # fmt: skip
    """The whole README, front matter included."""
    licence = licence_of(base)
    known = base in BASE_LICENCES
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": licence if known else "other",
        "tags": ["few-step", card.method, *(["lora"] if to in ("lora", "kohya") else [])],
    }
    steps = f"{card.num_inference_steps} step{'s' if card.num_inference_steps != 1 else ''}"
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {title}", ""]
    lines += [f"{base} in {steps}, distilled with the method `{card.method}` by fewstep.", ""]
    lines += ["![samples](samples.png)", ""] if picture else []
    lines += ["## Use", "", "```python", lines_of_code, "```", ""]
    lines += [f"Made for {steps}. ComfyUI's settings: {usage_hint(card, plan)}."]
    lines += ["", *(f"- {line}" for line in remarks)] if remarks else []
    lines += ["", "## Quality", "", measured(run), f"Trained for {card.steps} steps. {proof}", ""]
    lines += ["## Licence", "", f"This is a derivative of {base}: its licence ({licence}) binds this file too.", ""]
    return "\n".join(lines)
