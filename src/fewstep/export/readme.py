"""The README of an export: what it is, the code that uses it, what was measured, and its licence."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fewstep.export.header import only_for
from fewstep.export.hub_card import front_matter, licence_words, plain, shown
from fewstep.models.families import Family, shipped
from fewstep.sampling.diffusers_schedulers import SchedulerPlan
from fewstep.students.card import Card
from fewstep.training.logging import read_log
from fewstep.training.run_files import RunFiles


def code(to: str, base: str, file: str, family: Family, card: Card, plan: SchedulerPlan) -> str:
    """The lines of Python that use the export.

    Args:
        file: the LoRA's name.
    """
    here, draws = '"THIS_FOLDER"', f'image = pipe(prompt="a prompt", {call_arguments(card, plan)}).images[0]'
    if to == "diffusers":
        return "\n".join([
            "from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline.from_pretrained({here})", draws,
        ])  # fmt: skip
    names, place = ["DiffusionPipeline", plan.scheduler], _quoted(base)
    if to == "merged":
        network = type(family.base).__name__
        names, put = [*names, network], f"pipe.{family.part} = {network}.from_pretrained({here})"
    else:
        put = f"pipe.load_lora_weights({here}, weight_name={_quoted(file)})"
    lines = [f"from diffusers import {', '.join(sorted(names))}"]
    if shipped(base) is not None:
        lines, place = [*lines, "from fewstep.models.families import shipped"], f"shipped({_quoted(base)})"
    return "\n".join([
        *lines, "", f"pipe = DiffusionPipeline.from_pretrained({place})", put,
        f'pipe.scheduler = {plan.scheduler}.from_pretrained({here}, subfolder="scheduler")', draws,
    ])  # fmt: skip


def _quoted(text: str) -> str:
    """A string of Python in double quotes, whatever is in it."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def call_arguments(card: Card, plan: SchedulerPlan) -> str:
    """Arguments of the pipeline's call, beside the prompt, as Python."""
    steps = {} if plan.call.keys() & {"timesteps", "sigmas"} else {"num_inference_steps": card.num_inference_steps}
    return ", ".join(f"{key}={value!r}" for key, value in {**steps, **plan.call}.items())


def measured(source: Path, card: Card) -> str:
    """The evaluation of the very weights in a student's folder, in words.

    A run may keep another student than its last one: the evaluation counts that was made at the card's step.
    """
    files = RunFiles(source.parent)
    own = source.name in (files.student.name, files.best.name)
    lines = [line for line in read_log(files.evaluations) if line["step"] == card.steps] if own else []
    if not lines:
        return "These weights were not measured while they were trained; `fewstep report` measures a run."
    figures = {k: v for k, v in lines[-1].items() if k != "step" and isinstance(v, int | float)}
    words = ", ".join(f"{plain(name)} {value:.4g}" for name, value in figures.items())
    on = plain(str(lines[-1].get("on", "unseen prompts")))
    return f"At step {card.steps} of its training, on {on}: {words}."


def readme(
    to: str, title: str, base: str, lines_of_code: str, card: Card, hint: str, source: Path, proof: str,
    remarks: list[str], image: str,
) -> str:  # fmt: skip
    """The whole README, front matter included.

    Args:
        hint: ComfyUI's settings; empty: it has none for these files.
        source: folder of the student. image: file of its samples, empty for none.
    """
    name = plain(shown(base))
    steps = f"{card.num_inference_steps} step{'s' if card.num_inference_steps != 1 else ''}"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", lines_of_code)), default=0))
    lines = [*front_matter(to, base, card, source.parent, image), "", f"# {plain(title)}", ""]
    lines += [f"{name} in {steps}, distilled with the method {plain(card.method)} by fewstep.", ""]
    lines += [f"![samples]({image})", ""] if image else []
    lines += ["## Use", "", f"{fence}python", lines_of_code, fence, ""]
    lines += [f"Made for {steps}{only_for(card)}."]
    lines += ["", f"ComfyUI: {hint.rstrip('.')}."] if hint else []
    lines += ["", *(f"- {line}" for line in remarks)] if remarks else []
    lines += ["", "## Quality", "", measured(source, card), f"Trained for {card.steps} steps. {proof}", ""]
    lines += [
        "## Licence",
        "",
        f"This is a derivative of {name}: its licence ({plain(licence_words(base))}) applies to",
    ]
    return "\n".join([*lines[:-1], f"{lines[-1]} it too.", ""])
