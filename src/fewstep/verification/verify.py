"""`fewstep verify`: a method's contract, its fixed point, and a student trained to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Method
from fewstep.methods.guidance import OFF
from fewstep.methods.registry import find_method
from fewstep.training.progress import doing
from fewstep.verification.bench import Bench
from fewstep.verification.checks import checks_of
from fewstep.verification.contract import contract_rows
from fewstep.verification.report import Report


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
    """Compare a method with closed-form truth: one row per quantity, with its floor, its limit and whether it passed.

    Rows stand in this order: the contract (`contract_rows`), what holds without training (``fixed_rows`` of the
    method's file here), and the trained student (its ``trained_rows``).

    Args:
        method: a name, a `Method` subclass (yours too), or an instance.
        mixture: the data, or a JSON file of it; by default `Checks.mixture`: a ring of eight modes, for DMD2 four times
            as large, for CM, CTM and flow maps two modes on a line.
        seed: of data, starts and student.
        schedule: by default `Checks.schedule`: Stable Diffusion's, EDM's for CM and CTM, rectified flow for flow maps
            and PDD.
        steps: number of training steps; by default those of `Checks.steps` for the method; 0 trains nothing.
        settings: of the method, over its ``truth_settings``.

    Raises:
        ValueError: unknown method or setting, a mixture that is none.
    """
    cls = find_method(method) if isinstance(method, str) else method
    checks = checks_of(cls)
    schedule = schedule or checks.schedule()
    if not isinstance(cls, Method):
        settings = checks.settings(schedule, settings) | settings
    chosen = _instance(cls, schedule, settings)
    if mixture is None:
        mixture = checks.mixture
    elif not isinstance(mixture, GaussianMixture):
        mixture = GaussianMixture.from_json(mixture)
    guidance = chosen.teacher_guidance(chosen.settings) or OFF
    if not guidance.fixed:
        raise ValueError("verify needs one guidance_scale, not a range: the truth depends on it.")
    bench = Bench(mixture, chosen.schedule, seed, guidance.low, checks.prediction_type)
    report = Report(chosen.title)
    started = time.process_time()
    with doing(f"checking the contract of {chosen.name or chosen.title}"):
        report.rows += contract_rows(bench, chosen)
    with doing("comparing with closed forms, without training"):
        report.rows += checks.fixed(bench, chosen)
    steps = checks.default_steps(chosen, mixture.dim) if steps is None else steps
    if steps:
        trained = checks.train(bench, chosen, steps, show_progress)
        with doing("measuring the trained student"):
            report.rows += checks.trained(bench, chosen, trained.roles)
    seconds = time.process_time() - started
    report.about = f"{mixture}, {schedule.family} schedule, seed {seed}, {steps} steps, {seconds:.0f} s of CPU"
    return report


def _instance(cls: type[Method] | Method, schedule: Schedule, settings: dict[str, Any]) -> Method:
    if isinstance(cls, Method):
        return cls if not settings else type(cls)(cls.schedule, cls.settings, **settings)
    known = set(cls.setting_names())
    return cls(schedule, **{k: v for k, v in cls.truth_settings.items() if k in known} | settings)
