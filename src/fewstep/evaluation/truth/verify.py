"""`fewstep verify`: a method's contract, its fixed point, and a student trained to it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.evaluation.truth.bench import Bench
from fewstep.evaluation.truth.cm import cm_fixed_point, cm_fixed_point_rows, cm_rows
from fewstep.evaluation.truth.consistency import convergence_rows, lcm_rows, loss_rows, tcd_rows
from fewstep.evaluation.truth.contract import contract_rows, contract_rows_with_discriminator
from fewstep.evaluation.truth.distribution import distribution_rows
from fewstep.evaluation.truth.matched import RING, STEPS, matched_rows, train_matched
from fewstep.evaluation.truth.matching import matching_rows
from fewstep.evaluation.truth.phased import fixed_rows, trained_rows
from fewstep.evaluation.truth.report import Report, Row
from fewstep.evaluation.truth.trajectory import ctm_fixed_rows, ctm_rows
from fewstep.methods.base import Method
from fewstep.methods.cm import CM
from fewstep.methods.ctm import CTM
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.lcm import LCM
from fewstep.methods.pcm import PCM
from fewstep.methods.registry import find_method
from fewstep.methods.tcd import TCD
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer

STEPS_PER_HOP, MAX_STEPS, BATCH = 600, 12_000, 512
LINE = GaussianMixture([0.4, 0.6], [-0.6, 0.5], [0.5, 0.4])  # for CM and CTM: CT's truth is known on lines
LINE_STEPS_PER_HOP = 200


def verify(
    method: str | type[Method] | Method,
    mixture: GaussianMixture | str | Path | None = None,
    *,
    seed: int = 0,
    schedule: Schedule | None = None,
    steps: int | None = None,
    show_progress: bool = False,
    **settings: Any,
) -> Report:
    """Hold a method against closed-form truth: one row per quantity, with its floor, its limit and a verdict.

    Args:
        method: a name, a `Method` subclass (yours too), or an instance.
        mixture: the data, or a JSON file of it; a ring of eight modes by default (four times as large for
            DMD2), two modes on a line for CM and CTM.
        seed: of data, starts and student.
        schedule: Stable Diffusion's by default, EDM's for CM and CTM.
        steps: of training; by default 600 per hop of the training grid (CM and CTM on a line: 200), 12,000 at most,
            for DMD2 18,000; 0 trains nothing.
        settings: of the method, over its ``truth_settings``.

    Raises:
        ValueError: unknown method or setting, a mixture that is none.
    """
    cls = find_method(method) if isinstance(method, str) else method
    kind = type(cls) if isinstance(cls, Method) else cls
    on_a_line = issubclass(kind, CM | CTM)
    schedule = schedule or (Schedule.edm() if on_a_line else Schedule.scaled_linear())
    chosen = _instance(cls, schedule, settings)
    if mixture is None:
        mixture = LINE if on_a_line else RING if issubclass(kind, DMD2) else GaussianMixture.ring()
    elif not isinstance(mixture, GaussianMixture):
        mixture = GaussianMixture.from_json(mixture)
    scale = getattr(chosen.settings, "guidance_scale", 1.0)
    if not isinstance(scale, int | float):
        raise ValueError("verify wants one guidance_scale, not a range: the truth depends on it.")
    bench = Bench(mixture, chosen.schedule, seed, float(scale))
    variant = getattr(chosen.settings, "variant", "")
    report = Report((chosen.name or type(chosen).__name__) + (f" ({variant})" if variant else ""))
    started = time.process_time()
    report.rows += contract_rows(bench, chosen)
    report.rows += _fixed_point_rows(bench, chosen)
    if steps is None:
        per_hop = LINE_STEPS_PER_HOP if on_a_line and mixture.dim == 1 else STEPS_PER_HOP
        steps = min(MAX_STEPS, per_hop * getattr(chosen.settings, "num_grid_steps", 10))
        steps = STEPS if isinstance(chosen, DMD2) else steps
    if steps:
        if isinstance(chosen, DMD2):
            trainer = train_matched(bench, chosen, steps, show_progress)
        else:
            trainer = bench.train(chosen, training_settings(steps), show_progress)
        report.rows += _trained_rows(bench, chosen, trainer)
    seconds = time.process_time() - started
    report.about = f"{mixture}, {schedule.family} schedule, seed {seed}, {steps} steps, {seconds:.0f} s of CPU"
    return report


def training_settings(steps: int) -> TrainingSettings:
    """How verification trains its small students."""
    return TrainingSettings(
        steps=steps,
        batch_size=BATCH,
        learning_rate=3e-3,
        warmup_steps=min(100, steps // 10),
        lr_schedule="cosine",
        ema_decay=0.0,
        log_every=max(1, min(250, steps)),
    )


def _instance(cls: type[Method] | Method, schedule: Schedule, settings: dict[str, Any]) -> Method:
    if isinstance(cls, Method):
        return cls if not settings else type(cls)(cls.schedule, cls.settings, **settings)
    known = {f.name for f in dataclasses.fields(cls.Settings)}
    return cls(schedule, **{k: v for k, v in cls.truth_settings.items() if k in known} | settings)


def _fixed_point_rows(bench: Bench, method: Method) -> list[Row]:
    if isinstance(method, CM):
        return cm_fixed_point_rows(bench, method, cm_fixed_point(bench, method))
    if isinstance(method, LCM | TCD):
        return loss_rows(bench, method) + convergence_rows(bench, method)
    if isinstance(method, PCM):
        return fixed_rows(bench, method) + convergence_rows(bench, method)
    if isinstance(method, CTM):
        return ctm_fixed_rows(bench, method) + convergence_rows(bench, method)
    if isinstance(method, DMD2):
        rows = [] if method.game else contract_rows_with_discriminator(bench, method)
        return rows + matching_rows(bench.schedule)
    return []


def _trained_rows(bench: Bench, method: Method, trainer: Trainer) -> list[Row]:
    if isinstance(method, LCM):
        return lcm_rows(bench, method, trainer.roles)
    if isinstance(method, TCD):
        return tcd_rows(bench, method, trainer.roles)
    if isinstance(method, PCM):
        return trained_rows(bench, method, trainer.roles)
    if isinstance(method, CTM):
        return ctm_rows(bench, method, trainer.roles)
    if isinstance(method, DMD2):
        return matched_rows(bench, method, trainer.roles)
    if isinstance(method, CM) and (point := cm_fixed_point(bench, method)):
        return cm_rows(bench, method, trainer.roles, point)
    return distribution_rows(bench, method, trainer.roles)
