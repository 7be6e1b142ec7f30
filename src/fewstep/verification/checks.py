"""How each method is verified: the rows without training, how a student is trained, the rows about that student."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Method
from fewstep.methods.cm import CM
from fewstep.methods.ctm import CTM
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.feedback import Feedback
from fewstep.methods.flowmap import FlowMap
from fewstep.methods.hyper import Hyper
from fewstep.methods.ladd import LADD
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.pcm import PCM
from fewstep.methods.pdd import PDD
from fewstep.methods.reflow import Reflow
from fewstep.methods.scm import SCM
from fewstep.methods.tcd import TCD
from fewstep.methods.turbo import Turbo
from fewstep.models.roles import Roles
from fewstep.training.trainer import Trainer
from fewstep.verification import (
    cm,
    ctm,
    dmd,
    dmd2,
    dmd2_switches,
    feedback,
    flowmap,
    hyper,
    ladd,
    lcm,
    lightning,
    pcm,
    pdd,
    reflow,
    scm,
    tcd,
    turbo,
)
from fewstep.verification.bench import Bench, training_settings
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.report import Row

LINE = GaussianMixture([0.4, 0.6], [-0.6, 0.5], [0.5, 0.4])
"""For CM and CTM: CT's fixed point is known in one dimension only."""
TWO_MODES = GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35])
"""For slopes: the flow map is steep between the modes."""
STEPS_PER_SOLVER_STEP, LINE_STEPS_PER_SOLVER_STEP, MAX_STEPS = 600, 200, 12_000


def train_from_scratch(bench: Bench, method: Method, steps: int, show_progress: bool = False) -> Trainer:
    """Small networks of random weights, trained for ``steps``."""
    return bench.train(method, training_settings(steps), show_progress)


def no_rows(bench: Bench, method: Method) -> list[Row]:
    return []


@dataclass(frozen=True)
class Checks:
    """The checks of one method.

    Attributes:
        fixed: rows about what its loss is zero at, nothing trained.
        trained: rows about the roles of a trained student; by default the distribution it draws.
        steps: number of training steps; None: 600 per solver step of the grid (CM, CTM in 1-D: 200), 12,000 at most.
        train: from a bench, the method and steps to a trainer that has run.
        mixture: the data of `fewstep verify` by default; a ring of eight modes.
        schedule: of `fewstep verify` by default, Stable Diffusion's.
        on_a_line: truth is best known on a line.
        prediction_type: what the students predict.
        settings: more settings of the method, from the schedule and the names of those that are given.
    """

    fixed: Callable[[Bench, Any], list[Row]] = no_rows
    trained: Callable[[Bench, Any, Roles], list[Row]] = distribution_rows
    steps: int | None = None
    train: Callable[[Bench, Any, int, bool], Trainer] = train_from_scratch
    mixture: GaussianMixture = field(default_factory=GaussianMixture.ring)
    schedule: Callable[[], Schedule] = Schedule.scaled_linear
    on_a_line: bool = False
    prediction_type: str = "sample"
    settings: Callable[[Schedule, Collection[str]], dict[str, Any]] = lambda schedule, given: {}

    def default_steps(self, method: Method, dim: int) -> int:
        """The number of training steps of a student of ``method`` by default."""
        if self.steps is not None:
            return self.steps
        per_hop = LINE_STEPS_PER_SOLVER_STEP if self.on_a_line and dim == 1 else STEPS_PER_SOLVER_STEP
        return min(MAX_STEPS, per_hop * (method.original_inference_steps(method.settings) or 10))


def checks_of(method: type[Method] | Method) -> Checks:
    """The checks of a method or of its nearest base class; for others, only those of the samples' distribution."""
    cls = method if isinstance(method, type) else type(method)
    return next((CHECKS[base] for base in cls.__mro__ if base in CHECKS), Checks())


_of_slopes = partial(Checks, mixture=TWO_MODES, schedule=Schedule.flow, prediction_type="flow")

CHECKS: dict[type[Method], Checks] = {
    CM: Checks(cm.fixed_rows, cm.trained_rows, mixture=LINE, schedule=Schedule.edm, on_a_line=True),
    LCM: Checks(lcm.fixed_rows, lcm.trained_rows),
    TCD: Checks(tcd.fixed_rows, tcd.trained_rows),
    PCM: Checks(pcm.fixed_rows, pcm.trained_rows),
    CTM: Checks(ctm.fixed_rows, ctm.trained_rows, mixture=LINE, schedule=Schedule.edm, on_a_line=True),
    DMD: Checks(dmd.fixed_rows, dmd.trained_rows, dmd.PAIRED_STEPS),
    DMD2: Checks(
        dmd2_switches.fixed_rows, dmd2.trained_rows, dmd2.STEPS, dmd2.train, dmd2.RING, settings=dmd2.one_step_start
    ),
    Turbo: Checks(turbo.fixed_rows, steps=0),  # a GAN's fixed point on a finite network is unknown
    LADD: Checks(ladd.fixed_rows, steps=0),
    Lightning: Checks(lightning.fixed_rows, lightning.trained_rows),
    Feedback: Checks(no_rows, feedback.trained_rows, feedback.STEPS, feedback.train, feedback.WIDE),
    Hyper: Checks(hyper.fixed_rows, hyper.trained_rows),
    FlowMap: _of_slopes(flowmap.fixed_rows, flowmap.trained_rows, flowmap.STEPS),
    Reflow: _of_slopes(reflow.fixed_rows, reflow.trained_rows, reflow.STEPS),
    SCM: _of_slopes(scm.fixed_rows, scm.trained_rows, scm.STEPS),
    PDD: Checks(pdd.fixed_rows, pdd.trained_rows, pdd.STEPS, schedule=Schedule.flow, prediction_type="flow"),
}
