"""The README of an export: what it is, the code that uses it, what was measured, and its licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.models.families import Family, registry, shipped
from fewstep.sampling import SAMPLERS, Sampler
from fewstep.sampling.diffusers_schedulers import SchedulerPlan
from fewstep.students.card import Card
from fewstep.training.run_files import RunFiles

_OUR_LICENCE = "apache-2.0"  # of the models that come with this package


def licence_of(base: str) -> str:
    """Licence of a base model as its hub page names it; empty where it is not known here."""
    return _OUR_LICENCE if shipped(base) is not None else registry.licence_of(base)


def licence_words(base: str) -> str:
    """Licence of a base model; in words where it is not known here."""
    return licence_of(base) or f"that of {base}; read its card"


def usage_hint(card: Card, plan: SchedulerPlan) -> str:
    """ComfyUI's settings in one line, which programs show with the file."""
    sampler = SAMPLERS.get(card.sampler, Sampler)
    even = plan.scheduler == "LCMScheduler" and plan.config.get("original_inference_steps") != 50
    schedule = Sampler.comfyui_schedule if even else sampler.comfyui_schedule
    if "timesteps" in plan.call:  # none of ComfyUI's schedules has them
        schedule = f"the sigmas of timesteps {', '.join(f'{t:g}' for t in plan.call['timesteps'])}"
    words = [f"{card.num_inference_steps} steps", f"cfg {card.guidance_scale:g}", sampler.comfyui_name]
    return ", ".join([*words, schedule, *([f"eta {card.eta:g}"] if sampler.comfyui_eta else [])])


def code(to: str, base: str, file: str, family: Family, card: Card, plan: SchedulerPlan) -> str:
    """The lines of Python that use the export.

    Args:
        file: the LoRA's name.
    """
    here, draws = '"THIS_FOLDER"', f'image = pipe("a prompt", {call_arguments(card, plan)}).images[0]'
    if to == "diffusers":
        return "\n".join([
            "from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline.from_pretrained({here})", draws,
        ])  # fmt: skip
    names, place = ["DiffusionPipeline", plan.scheduler], f'"{base}"'
    if to == "merged":
        network = type(family.base).__name__
        names, put = [*names, network], f"pipe.{family.part} = {network}.from_pretrained({here})"
    else:
        put = f'pipe.load_lora_weights({here}, weight_name="{file}")'
    lines = [f"from diffusers import {', '.join(sorted(names))}"]
    if shipped(base) is not None:
        lines, place = [*lines, "from fewstep.models.families import shipped"], f'shipped("{base}")'
    return "\n".join([
        *lines, "", f"pipe = DiffusionPipeline.from_pretrained({place})", put,
        f'pipe.scheduler = {plan.scheduler}.from_pretrained({here}, subfolder="scheduler")', draws,
    ])  # fmt: skip


def call_arguments(card: Card, plan: SchedulerPlan) -> str:
    """Arguments of the pipeline's call, beside the prompt, as Python."""
    steps = {} if plan.call.keys() & {"timesteps", "sigmas"} else {"num_inference_steps": card.num_inference_steps}
    return ", ".join(f"{key}={value!r}" for key, value in {**steps, **plan.call}.items())


def measured(run: Path) -> str:
    """The last evaluation of the run, in words."""
    file = RunFiles(run).evaluations
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not lines:
        return "Not measured while it was trained; `fewstep report` measures a run."
    figures = {k: v for k, v in lines[-1].items() if k != "step" and isinstance(v, int | float)}
    words = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return f"At step {lines[-1]['step']} of its training, on unseen prompts: {words}."


def readme(
    to: str, title: str, base: str, lines_of_code: str, card: Card, plan: SchedulerPlan, run: Path, proof: str,
    remarks: list[str], image: bool,
) -> str:  # fmt: skip
    """The whole README, front matter included."""
    licence = licence_words(base)
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": licence_of(base) or "other",
        "tags": ["few-step", card.method, *(["lora"] if to in ("lora", "kohya") else [])],
    }
    steps = f"{card.num_inference_steps} step{'s' if card.num_inference_steps != 1 else ''}"
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {title}", ""]
    lines += [f"{base} in {steps}, distilled with the method `{card.method}` by fewstep.", ""]
    lines += ["![samples](samples.png)", ""] if image else []
    lines += ["## Use", "", "```python", lines_of_code, "```", ""]
    lines += [f"Made for {steps}. ComfyUI's settings: {usage_hint(card, plan)}."]
    lines += ["", *(f"- {line}" for line in remarks)] if remarks else []
    lines += ["", "## Quality", "", measured(run), f"Trained for {card.steps} steps. {proof}", ""]
    lines += ["## Licence", "", f"This is a derivative of {base}: its licence ({licence}) applies to it too.", ""]
    return "\n".join(lines)
