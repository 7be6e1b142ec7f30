"""The teacher's own samples for a recipe: made file by file before training, kept, and found again.

Every process of torchrun makes its share. What is finished stays, whatever happens; the rest ends in the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.data.files import only_one, text_hash
from fewstep.data.find import find_captions
from fewstep.data.pairs import PairFiles, PairSource, noise_of
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.lora import base_parameters
from fewstep.models.quantize import plain
from fewstep.recipe.schema import Recipe
from fewstep.runs.setup import Run
from fewstep.sampling import sample
from fewstep.sampling.solvers import SOLVERS
from fewstep.scenes64.scenes import Scenes
from fewstep.training import distributed
from fewstep.training.logging import progress_bar
from fewstep.training.machine import is_out_of_memory

_SEEN = 1024  # values of each weight that its fingerprint holds


def pairs_folder(recipe: Recipe, run: Path) -> Path:
    """Where the teacher's samples of a run are kept."""
    return run / "data" / "pairs" if recipe.pairs.path is None else Path(recipe.pairs.path)


def pair_files(job: Run, shared: Path | None = None) -> PairFiles | None:
    """The files of the samples that ``job.recipe.pairs`` describes, made or not; None where the recipe wants none.

    Args:
        shared: where the stages of one run keep their data: those that want the same samples find one folder there.

    Raises:
        ValueError: the folder holds other samples, or something else.
    """
    if not job.recipe.needs_pairs:
        return None
    wanted, place = about(job), pairs_folder(job.recipe, job.folder)
    if shared is not None and job.recipe.pairs.path is None:
        name = hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=4).hexdigest()
        place = shared / f"pairs-{name}"
    files = PairFiles(place, wanted)
    files.check()
    return files


def sample_teacher(job: Run, files: PairFiles, show_progress: bool = False) -> PairSource:
    """The teacher's samples from their files; those that are missing are made.

    Sample i has the caption of picture i of the recipe's data, counted round, and noise of its own.

    Raises:
        ValueError: somebody else works there; the teacher gives NaN.
    """
    missing = files.missing()
    distributed.wait()  # nobody may find the others' files before it has looked
    if missing:
        if distributed.first():
            files.claim()
        with only_one(files.place) if distributed.first() else nullcontext():
            _make(job, files, missing, show_progress)
            distributed.wait()
    return files.load(job.recipe.training.device)


@torch.no_grad()
def _make(job: Run, files: PairFiles, missing: list[int], show_progress: bool) -> None:
    """This process's share of the missing files."""
    distributed.wait()  # for the folder
    teacher, texts = job.roles.teacher.uncounted(), captions(job.recipe)
    there = files.size - sum(len(files.rows(number)) for number in missing)
    with progress_bar(files.size, there, "sampling the teacher", show_progress and distributed.first()) as advance:
        for number in missing[distributed.rank() :: distributed.count()]:
            rows, before = files.rows(number), teacher.cost.forward_equivalents
            cond = job.teacher.encode_prompts([texts[i] for i in rows])
            x0 = _sampled(job, teacher, rows, cond)
            files.write(number, x0, cond, teacher.cost.forward_equivalents - before)
            there += distributed.count() * len(rows)
            advance(min(there, files.size))


def _sampled(job: Run, teacher: Denoiser, rows: range, cond: Cond) -> Tensor:
    """Latents [rows, ...] as the recipe asks for them.

    Raises:
        ValueError: they are not finite in float16, or memory does not suffice.
    """
    settings, shape = job.recipe.pairs, job.teacher.latent_shape
    assert settings.guidance_scale is not None
    noise = torch.stack([noise_of(settings.seed, i, shape) for i in rows]).to(job.recipe.training.device)
    solver = SOLVERS[settings.solver](num_inference_steps=settings.num_inference_steps)
    try:
        x0 = sample(teacher, solver, noise, cond, settings.guidance_scale).x0
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = f"{len(rows)} pictures at once"
        raise ValueError(f"Out of memory while the teacher was sampled, {asked}: lower pairs.batch_size.") from None
    if not x0.half().isfinite().all():
        raise ValueError(
            f"The teacher's samples {rows[0]} to {rows[-1]} are not finite: lower pairs.guidance_scale, or try another "
            "pairs.solver."
        )
    return x0


def captions(recipe: Recipe, count: int | None = None) -> list[str]:
    """One caption for every pair, or for each of ``count`` pictures."""
    data, size = recipe.data, recipe.pairs.size if count is None else count
    assert size is not None
    if data.place is not None:
        distinct = find_captions(data.place, data.size)
    else:
        scenes = Scenes(data.seed)
        distinct = tuple(scenes.scene(i).caption for i in range(min(size, data.size or 0)))
    return [distinct[i % len(distinct)] for i in range(size)]


def about(job: Run) -> dict[str, str | int | float]:
    """What decides every value of the samples, up to rounding: the device and its precision are not part of it."""
    settings = job.recipe.pairs.model_dump(exclude={"path"})
    prompts = text_hash("\n".join(captions(job.recipe)))
    return {**settings, "prompts": prompts, "teacher": fingerprint(job)}


def fingerprint(job: Run) -> str:
    """A short name of the teacher: some values of every weight of its network and text encoders, kind and schedule.

    The weights are those of the frozen base, whatever adapters a student has put there.
    """
    denoiser, digest = job.teacher.denoiser, hashlib.blake2b(digest_size=8)
    for weight in _weights(job):
        flat = plain(weight.detach()).reshape(-1)
        seen = flat[:: max(1, flat.numel() // _SEEN)].float().cpu()
        digest.update(f"{tuple(weight.shape)}".encode() + seen.numpy().tobytes())
    alpha, sigma = denoiser.schedule.alpha_sigma(denoiser.schedule.timesteps(10))
    levels = " ".join(f"{level:.9g}" for level in (*alpha, *sigma))
    digest.update(f"{denoiser.prediction_type} {denoiser.schedule.family} {levels}".encode())
    return digest.hexdigest()


def _weights(job: Run) -> Iterator[Tensor]:
    yield from base_parameters(job.roles.base)
    for name, part in sorted(job.teacher.pipeline.components.items()):
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            yield from part.parameters()
