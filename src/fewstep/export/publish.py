"""`fewstep export`: a run's student as files for other programs, finished once they have been read back.

Diffusers reads them in a process of its own; files with a last layer for each step, which it has no use for, fewstep.

    diffusers   a pipeline folder: DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=4)
    lora        pytorch_lora_weights.safetensors in PEFT's layout, for diffusers, and ComfyUI if it is a transformer's
    kohya       a LoRA of a UNet in kohya's layout, for ComfyUI, A1111, Forge, InvokeAI and diffusers
    merged      the network alone with all its weights
    heads       a LoRA of a transformer with a last layer for each step (`fewstep.export.heads`)

Each folder holds few_step.json, the scheduler, a README, and samples.png if the run has one; it appears whole or not.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.data.files import aside, write_text
from fewstep.diffusion.schedule import Schedule
from fewstep.export.comfyui import forms_for_comfyui, usage_hint
from fewstep.export.files import LORAS, Content, Written, write_files
from fewstep.export.fold import Fold, fold_end, is_folded, refuse_fresh_noise
from fewstep.export.header import modelspec
from fewstep.export.heads import CODE, REMARK, check_heads, refuse_bank
from fewstep.export.hub_card import licence_file, one_line
from fewstep.export.limit import NUDGE, Limit, carried, growth
from fewstep.export.possible import REMEDY, obstacle
from fewstep.export.readme import call_arguments, code, readme
from fewstep.export.round_trip import Request, RoundTrip, check_round_trip
from fewstep.export.scheduler import plan_scheduler
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Family, Teacher, is_ours, shipped
from fewstep.models.hub import DTYPES, check_device, dtype_word, short_error
from fewstep.sampling import sample
from fewstep.sampling.diffusers_schedulers import SchedulerPlan
from fewstep.students.card import CARD_FILE, Card, load_card, sampler_of
from fewstep.students.exported import is_export
from fewstep.students.lineage import first_teacher, student_folder, teacher_of
from fewstep.students.student import SAMPLES_FILE, load_student, load_weights
from fewstep.training.progress import doing
from fewstep.training.run_files import RunFiles, refuse_missing_run

LAYOUTS = ("diffusers", "lora", "kohya", "merged", "heads")
PROMPTS = ("a red star", "two shapes")


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        folder: where it is. round_trip: how samples from its files compare with the student's.
        call: arguments of the pipeline's call. remarks: what its users must know, a sentence each.
    """

    folder: Path
    round_trip: RoundTrip
    call: str
    remarks: tuple[str, ...]


def export(run: Path, to: str, out: Path | None = None, dtype: str = "fp32", device: str = "cpu") -> Export:
    """Write the student of ``run`` for other programs, and compare samples from the files with the student's.

    Args:
        to: one of `LAYOUTS`. out: folder to write, ``<run>/export/<to>`` by default.
        dtype: of the weights in it, fp32, fp16 or bf16.

    Raises:
        ValueError: one sentence: nothing to export, or an export itself; a form no other program reads, or an export
            whose samples differ.
    """
    if to not in LAYOUTS:
        raise ValueError(f"Unknown --to '{to}': use {', '.join(LAYOUTS)}.")
    check_device(device, "--device")
    dtype = dtype_word(dtype, "--dtype")
    if is_export(run):
        raise ValueError(f"{run} is an export: name the run that it was made from.")
    source = student_folder(run)
    if source is None:
        refuse_missing_run(run)
        raise ValueError(f"{run} holds no finished student to export.")
    folder = out or RunFiles(run).export / to
    card = load_card(source)
    check_form(to, card, source)
    part = aside(folder)
    above: list[Path] = []
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is there already: choose another --out.")
        above = [parent for parent in part.parents if not parent.exists()]
        part.mkdir(parents=True)
        with doing(f"writing {folder} and sampling from it by diffusers"):
            made = _write(part, to, run, source, card, dtype, device)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The export cannot be written to {folder} ({_cause(error)}): make room or allow writing there, or "
            "choose another --out; nothing was left behind."
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in above:  # those that were made for it, as long as nothing is in them
            with suppress(OSError):
                parent.rmdir()
    return replace(made, folder=folder)


def check_form(to: str, card: Card, source: Path) -> None:
    """Refuse what would load elsewhere and sample something else.

    Raises:
        ValueError: one sentence: the student is conditioned on its guidance scale, or on s and sampled with fresh
            noise; it is no LoRA, or a LoRA on another student.
    """
    refuse_fresh_noise(card)
    refuse_bank(card, to)
    if to not in LORAS:
        return
    if card.bank and to != "heads":
        raise ValueError("This student's last layer is no LoRA: export --to diffusers or merged.")
    if card.extra_inputs and not is_folded(card):  # with its target times the scale too is folded into the LoRA
        raise ValueError(
            "This student has a guidance-scale embedding, which no program would run with its LoRA alone: "
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


@dataclass(frozen=True)
class _Wanted:
    """A student as it samples here, and what its export has to be.

    Attributes:
        trained, card: the student's card, and that of the export, which has its target times.
        base: the model that its files stand on. prediction, schedule: of its network.
        plan: of its scheduler. latents: `_latents` of it. limit: of their gap. fold: of its target times.
    """

    trained: Card
    card: Card
    base: str
    prediction: str
    schedule: Schedule
    plan: SchedulerPlan
    latents: Tensor
    limit: Limit
    fold: Fold | None


def _write(part: Path, to: str, run: Path, source: Path, card: Card, dtype: str, device: str) -> Export:
    """All files of an export into ``part``, checked in diffusers."""
    wanted = _wanted(source, card, dtype, device)
    card, base, title = wanted.card, wanted.base, one_line(run.resolve().name)
    # the student's adapters are on the other teacher's network: what is saved starts from a clean one
    teacher = teacher_of(source, card, device)
    family, closed = teacher.family, to == "diffusers" and _closes(teacher, card)
    plan = replace(wanted.plan, call=_call(wanted.plan.call, to, teacher, card, closed))
    if to == "diffusers":
        family.forget_sampling()
    elsewhere = forms_for_comfyui(to, card, family)
    hint = "" if to == "heads" else usage_hint(card, teacher, sampler_of(card), wanted.prediction) + elsewhere
    header = modelspec(card, family, title, teacher.image_size, wanted.prediction, hint, base, to in LORAS)
    content = Content(card, load_weights(source), wanted.fold, plan, closed, title, header, DTYPES[dtype])
    written = write_files(part, to, teacher, content)
    request = Request(
        str(shipped(base) or base), family.part, card.num_inference_steps, _prompts(family), call=plan.call,
        device=device, size=teacher.size,
    )  # fmt: skip
    request = replace(request, **written.parts)
    lines = CODE if to == "heads" else code(to, base, written.file.name if written.file else "", family, card, plan)
    with tempfile.TemporaryDirectory(prefix="fewstep-base-") as place:
        if to != "diffusers" and is_ours(base):
            teacher.pipeline.save_pretrained(place)
            request = replace(request, pipeline=place)
        del teacher, family  # the files are read back into a model of their own: one at a time
        trip = _read_back(to, written, request, wanted, device)
    _check_gap(trip, to, wanted, source, device)
    remarks = [*_remarks(to, written.card, plan, closed), *([REMARK] if to == "heads" else [])]
    _save_card(part, written.card, wanted, to, dtype, plan, trip)
    image = SAMPLES_FILE if (source / SAMPLES_FILE).is_file() else ""
    if image:
        shutil.copyfile(source / image, part / image)
    if licence := licence_file(base):
        write_text(part / "LICENSE.md", licence)
    checked = _checked(trip, to, dtype)
    write_text(part / "README.md", readme(to, title, base, lines, written.card, hint, source, checked, remarks, image))
    return Export(part, trip, call_arguments(written.card, plan), tuple(remarks))


def _wanted(source: Path, card: Card, dtype: str, device: str) -> _Wanted:
    """Sample the student, and plan its export.

    Raises:
        ValueError: one sentence: no other program can sample it.
    """
    teacher = teacher_of(source, card, device)
    prediction = card.prediction_type or teacher.denoiser.prediction_type
    schedule, config = teacher.denoiser.schedule, dict(teacher.pipeline.scheduler.config)
    if why := obstacle(replace(card, prediction_type=prediction), schedule, config, type(teacher.family)):
        raise ValueError(f"{why} A finished student has these keys in {source / CARD_FILE}." if REMEDY in why else why)
    plan = plan_scheduler(sampler_of(card), schedule, config, prediction, type(teacher.family))
    student = load_student(teacher, source, card)
    latents = _latents(teacher, student, card)
    limit = Limit(dtype, growth(sampler_of(card), schedule, prediction, latents))
    fold = _fold(teacher, student, card) if is_folded(card) else None
    told = replace(card, target_times=fold.targets if fold is not None else ())
    return _Wanted(card, told, first_teacher(source), prediction, schedule, plan, latents, limit, fold)


def _closes(teacher: Teacher, card: Card) -> bool:
    """Whether a pipeline of this student can be made to sample without guidance at any scale."""
    embeds = teacher.guidance_embed is not None  # an embedding that the network was trained with must stay
    return card.guidance_scale in (0, 1) and teacher.family.closes_guidance and not embeds


def _call(planned: dict[str, Any], to: str, teacher: Teacher, card: Card, closed: bool) -> dict[str, Any]:
    """Arguments of the pipeline's call: those of its scheduler, its guidance and its size."""
    call, family = dict(planned), teacher.family
    if not closed:
        own = teacher.guidance_embed if card.guidance_embed is None else card.guidance_embed
        embedded = None if "guidance_embed" in card.extra_inputs else own
        given = family.guidance_arguments(card.guidance_scale, embedded)
        usual = inspect.signature(type(teacher.pipeline).__call__).parameters if to == "diffusers" else {}
        call |= {key: value for key, value in given.items() if key not in usual or value != usual[key].default}
    call |= family.size_arguments()
    if to != "diffusers" and family.own_sigmas() and "sigmas" not in call:  # the base's pipeline would take its own
        n = card.num_inference_steps
        call["sigmas"] = [(n - k) / n for k in range(n)]
    return call


def _read_back(to: str, written: Written, request: Request, wanted: _Wanted, device: str) -> RoundTrip:
    """Sample from the files alone."""
    if to == "heads" and written.file is not None:
        return check_heads(written.file, written.card, wanted.base, device, wanted.latents, _latents)
    return check_round_trip(request, wanted.latents, written.layers)


def _check_gap(trip: RoundTrip, to: str, wanted: _Wanted, source: Path, device: str) -> None:
    """Refuse samples that differ by more than rounding explains."""
    limit = wanted.limit
    if trip.gap > limit.most:  # right all the same, where the student carries a rounding of its first state on
        more = _carried(source, wanted.trained, device, wanted.latents)
        limit = replace(limit, growth=max(limit.growth, more))
    limit.check(trip.gap, "read back by fewstep" if to == "heads" else "in diffusers")


def _save_card(
    part: Path, card: Card, wanted: _Wanted, to: str, dtype: str, plan: SchedulerPlan, trip: RoundTrip
) -> None:
    """The card of the export: the student's, and what the export is."""
    schedule = wanted.schedule
    more: dict[str, Any] = {
        "export": to, "dtype": dtype, "scheduler": plan.scheduler, "call": plan.call, "gap": trip.gap,
        "base": wanted.base,
        "shift": schedule.shift_at(card.num_inference_steps) if schedule.family == "flow" else None,
    }  # fmt: skip
    more |= {"terminal": schedule.terminal} if schedule.terminal else {}
    card.save(part, **more)


def _checked(trip: RoundTrip, to: str, dtype: str) -> str:
    """What reading the files back has shown, in words."""
    by = "by fewstep, from the file alone" if to == "heads" else "by diffusers in a process of its own"
    found = f", all {trip.layers} LoRA layers found" if trip.layers else ""
    return f"Read back {by} ({dtype} files): its latents are within {trip.gap:.1e} of fewstep's{found}."


def _prompts(family: Family) -> tuple[str, ...]:
    """Those that an export is tried with."""
    return PROMPTS[:1] if family.mixes_texts else PROMPTS


def _fold(teacher: Teacher, student: Denoiser, card: Card) -> Fold:
    """The student's target times, and its embedded guidance scale, for the run of its card."""
    like = next(teacher.family.base.parameters())
    x, cond = torch.zeros(1, *teacher.latent_shape, device=like.device), teacher.encode_prompts(list(PROMPTS[:1]))
    return fold_end(student, sampler_of(card), x, cond, card.guidance_embed)


def _latents(teacher: Teacher, student: Denoiser, card: Card, nudge: float = 0.0) -> Tensor:
    """The latents of `fewstep sample` for `_prompts` from seed 0, in the pipeline's form.

    Args:
        nudge: part by which each value of the first noise is made larger or smaller, at random.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = _prompts(teacher.family)
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=generator)
    if nudge:
        signs = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)).sign()
        noise = noise * (1 + nudge * signs)
    like = next(teacher.family.base.parameters())
    run = sample(
        student, sampler_of(card), noise.to(like.device), teacher.encode_prompts(list(prompts)), card.guidance_scale,
        guidance_embed=card.guidance_embed, generator=generator,
    )  # fmt: skip
    return teacher.family.output_latents(run.x0).cpu()


def _carried(source: Path, card: Card, device: str, latents: Tensor) -> float:
    """`carried` of the student in ``source``, whose ``latents`` are given: a model loaded and sampled once more."""
    teacher = teacher_of(source, card, device)
    return carried(latents, _latents(teacher, load_student(teacher, source, card), card, NUDGE))


def _remarks(to: str, card: Card, plan: SchedulerPlan, closed: bool) -> list[str]:
    """What an export cannot hold, or holds in an unusual way, a sentence each."""
    found = []
    if closed:
        found.append("Guidance is off in this pipeline at any guidance_scale; negative prompts do nothing.")
    if "guidance_embed" in card.extra_inputs:
        found.append(
            f"The student has a guidance-scale embedding: the scale {card.guidance_embed:g} is fixed in these weights."
        )
    if card.target_times:
        found.append(
            f"The student is conditioned on its target time, and the target times of {card.num_inference_steps} steps "
            "are fixed in these weights: they are right for that number of steps alone, at the full strength of a LoRA."
        )
    if to == "diffusers" and plan.call:
        found.append(f"No file of a pipeline can hold {' and '.join(plan.call)}: set it in every call.")
    if "shift_terminal" in plan.config:
        found.append(f"shift and shift_terminal of the scheduler are right for {card.num_inference_steps} steps only.")
    return found


def _cause(error: OSError | SafetensorError) -> str:
    """Why a file could not be written, without the names of files that libraries put before it."""
    return getattr(error, "strerror", None) or short_error(Exception(str(error).rpartition("I/O error: ")[2]))
