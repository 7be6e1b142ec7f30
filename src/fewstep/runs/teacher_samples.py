"""The teacher's samples for a recipe: generated file by file before training, kept, and found again.

Each process of torchrun generates its share. An interrupted run keeps the finished files, and a resumed one generates
the rest to the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fewstep.data.captions import encoder
from fewstep.data.files import only_one, text_hash
from fewstep.data.find import find_captions
from fewstep.data.pairs import TEXT_KEY, PairFiles, PairSource, noise_of
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families import Teacher
from fewstep.models.lora import base_parameters
from fewstep.models.quantize import plain
from fewstep.recipe.schema import PairsConfig, Recipe
from fewstep.runs.folder import RunFolder
from fewstep.runs.setup import Run
from fewstep.sampling import sample
from fewstep.sampling.solvers import SOLVERS
from fewstep.scenes64.scenes import Scenes
from fewstep.training import distributed
from fewstep.training.machine import is_out_of_memory
from fewstep.training.progress import doing, progress_bar

_SEEN = 1024  # values of each weight that enter the fingerprint


@dataclass(frozen=True)
class TeacherSampling:
    """What the teacher generates: one sample for each caption, each from noise of its own.

    Attributes:
        teacher: the model, which encodes the captions. denoiser: its network.
        settings: solver, steps, guidance scale, seed and rows of a file. captions: one for each sample.
        device: to sample on. live: the files keep captions in the place of their embeddings.
    """

    teacher: Teacher
    denoiser: Denoiser
    settings: PairsConfig
    captions: Sequence[str]
    device: str
    live: bool = False

    @classmethod
    def of_run(cls, run: Run) -> TeacherSampling:
        """The samples that ``run.recipe.pairs`` describes."""
        recipe = run.recipe
        teacher = run.roles.teacher.uncounted()
        return cls(run.teacher, teacher, recipe.pairs, captions(recipe), recipe.training.device, recipe.data.live)

    @cached_property
    def about(self) -> dict[str, str | int | float]:
        """Everything that determines the samples, up to rounding: device and precision are not part of it."""
        settings = self.settings.model_dump(exclude={"path"}) | ({TEXT_KEY: "live"} if self.live else {})
        return {**settings, "prompts": text_hash("\n".join(self.captions)), "teacher": fingerprint(self.teacher)}

    def files(self, place: Path) -> PairFiles:
        """Their files in ``place``, existing or not.

        Raises:
            ValueError: the folder holds other samples, or something else.
        """
        files = PairFiles(place, self.about)
        files.check()
        return files

    def load(self, files: PairFiles, show_progress: bool = False) -> PairSource:
        """The samples from their files; missing ones are generated.

        Of programs that need the same samples at the same time one generates them, and the others wait.

        Raises:
            ValueError: the teacher gives NaN; the files are of another size of images.
        """
        if _missing(files):
            distributed.check_shared(files.place)
            with self._turn(files):
                self._generate(files, _missing(files), show_progress)
                distributed.wait()
        found = files.load(encoder(self.teacher) if self.live else None)
        if found.shape != self.teacher.latent_shape:
            raise ValueError(
                f"{files.place} holds latents {list(found.shape)}, but this recipe needs "
                f"{list(self.teacher.latent_shape)}, as images of another size have: choose another pairs.path."
            )
        return found

    @contextmanager
    def _turn(self, files: PairFiles) -> Iterator[None]:
        """Within this block no other program writes these files, which are this set's."""
        if not distributed.first():
            yield
            return
        files.place.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with doing(f"waiting until no other process is at work in {files.place}"):
                stack.enter_context(only_one(files.place, wait=True))
            files.check()  # the other one may have made another set
            files.claim()
            yield

    @torch.no_grad()
    def _generate(self, files: PairFiles, missing: list[int], show_progress: bool) -> None:
        """Generate this process's share of the missing files."""
        there = files.size - sum(len(files.rows(number)) for number in missing)
        with progress_bar(files.size, there, "sampling the teacher", show_progress and distributed.first()) as advance:
            for number in missing[distributed.rank() :: distributed.count()]:
                rows, before = files.rows(number), self.denoiser.cost.forward_equivalents
                captions = [self.captions[i] for i in rows]
                cond = self.teacher.encode_prompts(captions)
                x0 = self._sample(rows, cond)
                spent = self.denoiser.cost.forward_equivalents - before
                kept = captions if self.live else ()
                files.write(number, x0, cond.to(self.teacher.family.text_dtype), spent, kept)
                there += distributed.count() * len(rows)
                advance(min(there, files.size))

    def _sample(self, rows: range, cond: Cond) -> Tensor:
        """Latents [rows, ...] for these captions.

        Raises:
            ValueError: they are not finite in float16, or memory does not suffice.
        """
        settings, shape = self.settings, self.teacher.latent_shape
        assert settings.guidance_scale is not None
        noise = torch.stack([noise_of(settings.seed, i, shape) for i in rows]).to(self.device)
        solver = SOLVERS[settings.solver](num_inference_steps=settings.num_inference_steps)
        try:
            x0 = sample(self.denoiser, solver, noise, cond, settings.guidance_scale).x0
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"Out of memory while the teacher was sampled, {len(rows)} images at once: lower pairs.batch_size."
            ) from None
        if not x0.half().isfinite().all():
            raise ValueError(
                f"The teacher's samples {rows[0]} to {rows[-1]} are not finite: lower pairs.guidance_scale, or try "
                "another pairs.solver."
            )
        return x0


def _missing(files: PairFiles) -> list[int]:
    """Numbers of the files that are missing, in every process as the first one has seen it."""
    missing = files.missing() if distributed.first() else []
    return distributed.from_first(missing)


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
    wanted, place = TeacherSampling.of_run(run), pairs_folder(run.recipe, run.folder)
    if shared is not None and run.recipe.pairs.path is None:
        place = folder_for(shared, "pairs", wanted.about)
    return wanted.files(place)


def folder_for(shared: Path, kind: str, about: Mapping[str, str | int | float]) -> Path:
    """The folder in ``shared`` of samples that are ``about`` this."""
    name = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=4).hexdigest()
    return shared / f"{kind}-{name}"


def sample_teacher(run: Run, files: PairFiles, show_progress: bool = False) -> PairSource:
    """The teacher's samples of a run, as `TeacherSampling.load`.

    Sample i has the caption of image i of the recipe's data, which start again after the last, and noise of its own.
    """
    return TeacherSampling.of_run(run).load(files, show_progress)


def captions(recipe: Recipe) -> list[str]:
    """One caption for every pair."""
    size = recipe.pairs.size
    assert size is not None
    distinct = data_captions(recipe, size)
    return [distinct[i % len(distinct)] for i in range(size)]


def data_captions(recipe: Recipe, scenes: int | None = None) -> tuple[str, ...]:
    """The captions of the images that are trained on, in their order; of rendered ones the first ``scenes``."""
    data = recipe.data
    if recipe.place is not None:
        return find_captions(recipe.place, data.size)
    size = data.size or 0
    return tuple(Scenes(data.seed).scene(i).caption for i in range(size if scenes is None else min(scenes, size)))


def fingerprint(teacher: Teacher) -> str:
    """Hash of the teacher: some values of every weight of its network and text encoders, its prediction and schedule.

    The weights are those of the frozen base, whatever adapters a student has added to it.
    """
    denoiser, digest = teacher.denoiser, hashlib.blake2b(digest_size=8)
    for weight in _weights(teacher):
        flat = plain(weight.detach()).reshape(-1)
        seen = flat[:: max(1, flat.numel() // _SEEN)].float().cpu()
        digest.update(f"{tuple(weight.shape)}".encode() + seen.numpy().tobytes())
    alpha, sigma = denoiser.schedule.alpha_sigma(denoiser.schedule.timesteps(10))
    levels = " ".join(f"{level:.9g}" for level in (*alpha, *sigma))
    digest.update(f"{denoiser.prediction_type} {denoiser.schedule.family} {levels}".encode())
    return digest.hexdigest()


def _weights(teacher: Teacher) -> Iterator[Tensor]:
    yield from base_parameters(cast(nn.Module, teacher.denoiser.network))
    for name, part in sorted(teacher.pipeline.components.items()):
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            yield from part.parameters()
