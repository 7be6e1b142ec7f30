"""`fewstep export`: a run's student as files for other programs, read back by them before anything is said to be done.

    diffusers   a pipeline folder: DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=4)
    lora        pytorch_lora_weights.safetensors in PEFT's layout, for diffusers, and ComfyUI if it is a transformer's
    kohya       a LoRA of a UNet in kohya's layout, for ComfyUI, A1111, Forge, InvokeAI and diffusers
    merged      the network alone with all its weights

Each folder holds few_step.json, the scheduler, a README, samples.png where the run has one; it appears whole or not.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.files import give_usual_permissions, write_text
from fewstep.export.header import modelspec, write
from fewstep.export.lora import kohya_layout, layers, peft_layout
from fewstep.export.pipeline import close_guidance, put_student, refuse_end, save_network, save_pipeline
from fewstep.export.readme import call, code, licence_of, readme, usage_hint
from fewstep.export.round_trip import LIMITS, Question, RoundTrip, prove
from fewstep.export.scheduler import SchedulerPlan, plan_scheduler
from fewstep.models.families import Teacher, is_ours, shipped
from fewstep.models.lora_files import network_of
from fewstep.sampling import sample
from fewstep.students.lineage import first_teacher, student_folder, teacher_of
from fewstep.students.student import (
    CARD_FILE,
    LORA_FILE,
    SAMPLES_FILE,
    Card,
    load_card,
    load_student,
    load_weights,
    sampler_of,
)
from fewstep.training.run_files import RunFiles

LAYOUTS = ("diffusers", "lora", "kohya", "merged")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPTS = ("a red star", "two shapes")


@dataclass(frozen=True)
class Export:
    """What was made.

    Attributes:
        folder: where. proof: how it compares in diffusers.
        call: arguments of the pipeline's call. remarks: what its readers must know, a sentence each.
    """

    folder: Path
    proof: RoundTrip
    call: str
    remarks: tuple[str, ...]


def export(run: Path, to: str, out: Path | None = None, dtype: str = "float32", device: str = "cpu") -> Export:
    """Write the student of ``run`` for other programs, and compare what diffusers draws from it with fewstep.

    Args:
        to: one of `LAYOUTS`. out: folder to write, ``<run>/export/<to>`` by default. dtype: of the weights in it.

    Raises:
        ValueError: one sentence: nothing to export, a form no other program reads, or an export that draws otherwise.
    """
    if to not in LAYOUTS:
        raise ValueError(f"Unknown --to '{to}': use {', '.join(LAYOUTS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"Unknown --dtype '{dtype}': use {', '.join(DTYPES)}.")
    source = student_folder(run)
    if source is None:
        raise ValueError(f"{run} holds no finished student to export.")
    folder = out or RunFiles(run).export / to
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: choose another --out.")
    card, tensors = load_card(source), load_weights(source)
    check_form(to, card, source)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        made = _write(part, folder.name, to, run, source, card, tensors, dtype, device)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return replace(made, folder=folder)


def check_form(to: str, card: Card, source: Path) -> None:
    """Refuse in one sentence what would load elsewhere and draw something else.

    Raises:
        ValueError: the student is told its target time or its guidance; it is no LoRA, or one on another student.
    """
    refuse_end(card)
    if to not in ("lora", "kohya"):
        return
    if card.extra_inputs:
        raise ValueError(
            "This student is told its guidance scale, which no program would do with its LoRA alone: "
            "--to diffusers and --to merged fix the scale in the weights."
        )
    if card.weights != "lora":
        raise ValueError(f"The student in {source} has full weights, it is no LoRA: export --to diffusers or merged.")
    if first_teacher(source) != card.teacher:
        raise ValueError(
            f"The LoRA in {source} stands on another student, {card.teacher}, which others do not have: "
            "export --to diffusers or merged."
        )
    if is_ours(card.teacher) and "+" in card.teacher:
        raise ValueError(
            f"The LoRA in {source} stands on a model with LoRAs of its own, {card.teacher}: export --to diffusers or "
            "merged."
        )


def _write(
    part: Path, name: str, to: str, run: Path, source: Path, card: Card, tensors: dict[str, Tensor], dtype: str,
    device: str,
) -> Export:  # fmt: skip
    teacher = teacher_of(source, card, device)
    expected = _draw(teacher, source, card, PROMPTS)
    prediction, base = card.prediction_type or teacher.denoiser.prediction_type, first_teacher(source)
    pipeline = type(teacher.pipeline).__name__
    schedule, config = teacher.denoiser.schedule, dict(teacher.pipeline.scheduler.config)
    plan = plan_scheduler(sampler_of(card), schedule, config, prediction, pipeline)
    title = run.resolve().name if source != run else source.resolve().name
    del teacher  # the student's adapters are on it: what is saved starts from a clean one
    teacher = teacher_of(source, card, device)
    closed = to == "diffusers" and card.guidance_scale == 1 and network_of(teacher.pipeline)[0] == "unet"
    if not closed:
        told = card.guidance_embed or teacher.guidance_embed  # FLUX calls what it is told guidance_scale
        scale = told if told is not None and "guidance_embed" not in card.extra_inputs else card.guidance_scale
        if to != "diffusers" or scale != _usual_guidance(teacher.pipeline):
            plan = replace(plan, call={**plan.call, "guidance_scale": scale})
    header = modelspec(
        card, teacher.pipeline, title, teacher.image_size, prediction, usage_hint(card, plan), licence_of(base),
        to in ("lora", "kohya"),
    )  # fmt: skip
    question, file, count = Question(str(shipped(base) or base), card.num_inference_steps, PROMPTS), "", 0
    question = replace(question, call=plan.call, device=device, size=teacher.size)
    if to in ("lora", "kohya"):
        file = LORA_FILE if to == "lora" else f"{title}_comfy.safetensors"
        found, said = (peft_layout if to == "lora" else kohya_layout)(tensors)
        count = len(layers(tensors))
        write(part / file, {key: t.to(DTYPES[dtype]).contiguous() for key, t in found.items()}, {**header, **said})
        question = replace(question, lora=str(part / file))
    else:
        network = put_student(teacher, card, tensors)
        if closed:
            close_guidance(network)
        if to == "merged":
            save_network(network, part, DTYPES[dtype])
            question = replace(question, network=str(part))
        else:
            teacher.pipeline.scheduler = plan.build()
            save_pipeline(teacher.pipeline, part, DTYPES[dtype])
            question = replace(question, pipeline=str(part))
        _say_in_headers(part if to == "merged" else part / network_of(teacher.pipeline)[0], header)
    if to != "diffusers":
        plan.build().save_pretrained(part / "scheduler")
        question = replace(question, scheduler=str(part / "scheduler"), scheduler_class=plan.scheduler)
    for path in part.rglob("*.safetensors"):
        give_usual_permissions(path)
    with tempfile.TemporaryDirectory(prefix="fewstep-base-") as place:
        if to != "diffusers" and is_ours(base):
            teacher.pipeline.save_pretrained(place)
            question = replace(question, pipeline=place)
        proof = prove(question, expected, count, LIMITS[dtype])
    remarks = _remarks(to, card, plan, closed)
    lines = code(to, base, file, type(network_of(teacher.pipeline)[1]).__name__, card, plan)
    shift = schedule.shift if schedule.family == "flow" else None
    _describe(part, to, title, base, lines, card, plan, source, dtype, proof, remarks, shift)
    return Export(part, proof, call(card, plan), tuple(remarks))


def _draw(teacher: Teacher, source: Path, card: Card, prompts: Sequence[str]) -> Tensor:
    """What `fewstep sample` draws from seed 0, as latents."""
    generator = torch.Generator().manual_seed(0)
    student = load_student(teacher, source, card)
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=generator)
    like = next(network_of(teacher.pipeline)[1].parameters())
    run = sample(
        student, sampler_of(card), noise.to(like.device), teacher.encode_prompts(list(prompts)), card.guidance_scale,
        guidance_embed=card.guidance_embed, generator=generator,
    )  # fmt: skip
    return run.x0.cpu()


def _remarks(to: str, card: Card, plan: SchedulerPlan, closed: bool) -> list[str]:
    """What an export cannot hold, or holds in an unusual way."""
    found = []
    if closed:
        found.append("Guidance is off in this pipeline whatever guidance_scale says; negative prompts do nothing.")
    if "guidance_embed" in card.extra_inputs:
        found.append(f"The student is told its guidance scale: {card.guidance_embed:g} is fixed in these weights.")
    if to == "diffusers" and plan.call:
        found.append(f"No file of a pipeline can hold {' and '.join(plan.call)}: set it in every call.")
    if "shift_terminal" in plan.config:
        found.append(f"shift and shift_terminal of the scheduler are right for {card.num_inference_steps} steps alone.")
    return found


def _describe(
    part: Path, to: str, title: str, base: str, lines: str, card: Card, plan: SchedulerPlan, source: Path, dtype: str,
    proof: RoundTrip, remarks: list[str], shift: float | None,
) -> None:  # fmt: skip
    picture = source / SAMPLES_FILE
    if picture.is_file():
        shutil.copyfile(picture, part / SAMPLES_FILE)
    said = f"Read back by diffusers in a process of its own ({dtype} files): its latents are within {proof.gap:.1e} of "
    said += f"fewstep's{f', all {proof.layers} LoRA layers found' if proof.layers else ''}."
    extra = {
        "export": to, "dtype": dtype, "scheduler": plan.scheduler, "call": plan.call, "gap": proof.gap, "base": base,
        "shift": shift,
    }  # fmt: skip
    write_text(part / CARD_FILE, json.dumps({**asdict(card), **extra}, indent=1) + "\n")
    text = readme(to, title, base, lines, card, plan, source.parent, said, remarks, picture.is_file())
    write_text(part / "README.md", text)


def _say_in_headers(folder: Path, header: dict[str, str]) -> None:
    """The header for a network that is one file; the parts of a large one share their index instead."""
    files = list(folder.glob("*.safetensors"))
    if len(files) == 1:
        write(files[0], load_file(files[0]), header)


def _usual_guidance(pipeline: Any) -> float | None:
    """The scale that a pipeline takes when nobody says one."""
    default: float | None = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
    return default
