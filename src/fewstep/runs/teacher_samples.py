"""The teacher's samples for a recipe: generated file by file before training, kept, and found again.

Each process of torchrun generates its share. An interrupted run keeps the finished files, and a resumed one generates
the rest to the same bits.
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
from fewstep.runs.folder import RunFolder
from fewstep.runs.setup import Run
from fewstep.sampling import sample
from fewstep.sampling.solvers import SOLVERS
from fewstep.scenes64.scenes import Scenes
from fewstep.training import distributed
from fewstep.training.machine import is_out_of_memory
from fewstep.training.progress import progress_bar

_SEEN = 1024  # values of each weight that enter the fingerprint


def pairs_folder(recipe: Recipe, folder: RunFolder) -> Path:
    """The folder of a run's samples of its teacher."""
    return folder.pairs if recipe.pairs.path is None else Path(recipe.pairs.path)


def pair_files(run: Run, shared: Path | None = None) -> PairFiles | None:
    """The files of the samples that ``run.recipe.pairs`` describes, existing or not; None where it needs none.

    Args:
        shared: data folder of a run of several stages, where stages that need the same samples share one folder.

    Raises:
        ValueError: the folder holds other samples, or something else.
    """
    if not run.recipe.needs_pairs:
        return None
    wanted, place = about(run), pairs_folder(run.recipe, run.folder)
    if shared is not None and run.recipe.pairs.path is None:
        name = hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=4).hexdigest()
        place = shared / f"pairs-{name}"
    files = PairFiles(place, wanted)
    files.check()
    return files


def sample_teacher(run: Run, files: PairFiles, show_progress: bool = False) -> PairSource:
    """The teacher's samples from their files; missing ones are generated.

    Sample i has the caption of image i of the recipe's data, which start again after the last, and noise of its own.

    Raises:
        ValueError: another program works there; the teacher gives NaN.
    """
    missing = files.missing()
    distributed.wait()  # every process must have looked before one of them creates files
    if missing:
        if distributed.first():
            files.claim()
        with only_one(files.place) if distributed.first() else nullcontext():
            _generate(run, files, missing, show_progress)
            distributed.wait()
    return files.load(run.recipe.training.device)


@torch.no_grad()
def _generate(run: Run, files: PairFiles, missing: list[int], show_progress: bool) -> None:
    """Generate this process's share of the missing files."""
    distributed.wait()  # until the first process has made the folder
    teacher, texts = run.roles.teacher.uncounted(), captions(run.recipe)
    there = files.size - sum(len(files.rows(number)) for number in missing)
    with progress_bar(files.size, there, "sampling the teacher", show_progress and distributed.first()) as advance:
        for number in missing[distributed.rank() :: distributed.count()]:
            rows, before = files.rows(number), teacher.cost.forward_equivalents
            cond = run.teacher.encode_prompts([texts[i] for i in rows])
            x0 = _sample(run, teacher, rows, cond)
            files.write(number, x0, cond, teacher.cost.forward_equivalents - before)
            there += distributed.count() * len(rows)
            advance(min(there, files.size))


def _sample(run: Run, teacher: Denoiser, rows: range, cond: Cond) -> Tensor:
    """Latents [rows, ...] for these captions, by the solver and guidance scale of the recipe.

    Raises:
        ValueError: they are not finite in float16, or memory does not suffice.
    """
    settings, shape = run.recipe.pairs, run.teacher.latent_shape
    assert settings.guidance_scale is not None
    noise = torch.stack([noise_of(settings.seed, i, shape) for i in rows]).to(run.recipe.training.device)
    solver = SOLVERS[settings.solver](num_inference_steps=settings.num_inference_steps)
    try:
        x0 = sample(teacher, solver, noise, cond, settings.guidance_scale).x0
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"Out of memory while the teacher was sampled, {len(rows)} images at once: lower pairs.batch_size."
        ) from None
    if not x0.half().isfinite().all():
        raise ValueError(
            f"The teacher's samples {rows[0]} to {rows[-1]} are not finite: lower pairs.guidance_scale, or try another "
            "pairs.solver."
        )
    return x0


def captions(recipe: Recipe, count: int | None = None) -> list[str]:
    """One caption for every pair, or for each of ``count`` images."""
    data, size = recipe.data, recipe.pairs.size if count is None else count
    assert size is not None
    if data.place is not None:
        distinct = find_captions(data.place, data.size)
    else:
        scenes = Scenes(data.seed)
        distinct = tuple(scenes.scene(i).caption for i in range(min(size, data.size or 0)))
    return [distinct[i % len(distinct)] for i in range(size)]


def about(run: Run) -> dict[str, str | int | float]:
    """Everything that determines the samples, up to rounding: the device and its precision are not part of it."""
    settings = run.recipe.pairs.model_dump(exclude={"path"})
    prompts = text_hash("\n".join(captions(run.recipe)))
    return {**settings, "prompts": prompts, "teacher": fingerprint(run)}


def fingerprint(run: Run) -> str:
    """Hash of the teacher: some values of every weight of its network and text encoders, its prediction and schedule.

    The weights are those of the frozen base, whatever adapters a student has added to it.
    """
    denoiser, digest = run.teacher.denoiser, hashlib.blake2b(digest_size=8)
    for weight in _weights(run):
        flat = plain(weight.detach()).reshape(-1)
        seen = flat[:: max(1, flat.numel() // _SEEN)].float().cpu()
        digest.update(f"{tuple(weight.shape)}".encode() + seen.numpy().tobytes())
    alpha, sigma = denoiser.schedule.alpha_sigma(denoiser.schedule.timesteps(10))
    levels = " ".join(f"{level:.9g}" for level in (*alpha, *sigma))
    digest.update(f"{denoiser.prediction_type} {denoiser.schedule.family} {levels}".encode())
    return digest.hexdigest()


def _weights(run: Run) -> Iterator[Tensor]:
    yield from base_parameters(run.roles.base)
    for name, part in sorted(run.teacher.pipeline.components.items()):
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            yield from part.parameters()
