"""How each method is held to the truth: what can be checked untrained, how a student is trained, what it must give."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Method
from fewstep.methods.cm import CM
from fewstep.methods.ctm import CTM
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.feedback import Feedback
from fewstep.methods.hyper import Hyper
from fewstep.methods.ladd import LADD
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.pcm import PCM
from fewstep.methods.tcd import TCD
from fewstep.methods.turbo import Turbo
from fewstep.models.roles import Roles
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer
from fewstep.verification.bench import Bench
from fewstep.verification.cm import cm_fixed_point, cm_fixed_point_rows, cm_rows
from fewstep.verification.consistency import convergence_rows, lcm_rows, loss_rows, tcd_rows
from fewstep.verification.contract import contract_rows_with_discriminator
from fewstep.verification.ctm import ctm_fixed_rows, ctm_rows
from fewstep.verification.distribution import distribution_rows
from fewstep.verification.dmd import PAIRED_STEPS, dmd_fixed_rows, dmd_rows
from fewstep.verification.dmd2 import RING, STEPS, matched_rows, one_step_start, train_matched
from fewstep.verification.feedback import (
    FEEDBACK_STEPS,
    WIDE,
    feedback_fixed_rows,
    feedback_rows,
    train_feedback,
)
from fewstep.verification.hyper import hyper_fixed_rows, hyper_rows
from fewstep.verification.ladd import ladd_fixed_rows
from fewstep.verification.lightning import lightning_fixed_rows, lightning_rows
from fewstep.verification.pcm import fixed_rows, trained_rows
from fewstep.verification.report import Row
from fewstep.verification.turbo import turbo_fixed_rows

LINE = GaussianMixture([0.4, 0.6], [-0.6, 0.5], [0.5, 0.4])  # for CM and CTM: CT's truth is known on lines
STEPS_PER_HOP, LINE_STEPS_PER_HOP, MAX_STEPS, BATCH = 600, 200, 12_000, 512


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


def train_from_scratch(bench: Bench, method: Method, steps: int, show_progress: bool = False) -> Trainer:
    """Small networks of random weights, trained for ``steps``."""
    return bench.train(method, training_settings(steps), show_progress)


@dataclass(frozen=True)
class Proof:
    """What is known of a method.

    Attributes:
        fixed: rows about what its loss is zero at, nothing trained.
        trained: rows about the roles of a trained student; by default the distribution it draws.
        steps: of training; None: 600 for every hop of the training grid (on a line of CM and CTM 200), 12,000 at most.
        train: from a bench, the method and steps to a trainer that has run.
        mixture: the data of `fewstep verify` by default; a ring of eight modes.
        on_a_line: truth is best known on a line, and on EDM's schedule.
        settings: more settings of the method, from the schedule and the names of those that are given.
    """

    fixed: Callable[[Bench, Any], list[Row]] = lambda bench, method: []
    trained: Callable[[Bench, Any, Roles], list[Row]] = distribution_rows
    steps: int | None = None
    train: Callable[[Bench, Any, int, bool], Trainer] = train_from_scratch
    mixture: GaussianMixture = field(default_factory=GaussianMixture.ring)
    on_a_line: bool = False
    settings: Callable[[Schedule, Collection[str]], dict[str, Any]] = lambda schedule, given: {}

    def default_steps(self, method: Method, dim: int) -> int:
        """How long a student of ``method`` is trained unless told."""
        if self.steps is not None:
            return self.steps
        per_hop = LINE_STEPS_PER_HOP if self.on_a_line and dim == 1 else STEPS_PER_HOP
        return min(MAX_STEPS, per_hop * (method.original_inference_steps(method.settings) or 10))


def proof_of(method: type[Method] | Method) -> Proof:
    """What is known of a method, or of the one that it was derived from; of others only that it must draw the data."""
    cls = method if isinstance(method, type) else type(method)
    return next((PROOFS[base] for base in cls.__mro__ if base in PROOFS), Proof())


def _cm_fixed(bench: Bench, method: CM) -> list[Row]:
    return cm_fixed_point_rows(bench, method, cm_fixed_point(bench, method))


def _cm_trained(bench: Bench, method: CM, roles: Roles) -> list[Row]:
    point = cm_fixed_point(bench, method)
    return cm_rows(bench, method, roles, point) if point else distribution_rows(bench, method, roles)


def _dmd2_fixed(bench: Bench, method: DMD2) -> list[Row]:
    return [] if method.gan else contract_rows_with_discriminator(bench, method)


def _lightning_trained(bench: Bench, method: Lightning, roles: Roles) -> list[Row]:
    return (lightning_rows if method.settings.loss == "mse" else distribution_rows)(bench, method, roles)


PROOFS: dict[type[Method], Proof] = {
    CM: Proof(_cm_fixed, _cm_trained, mixture=LINE, on_a_line=True),
    LCM: Proof(lambda bench, method: loss_rows(bench, method) + convergence_rows(bench), lcm_rows),
    TCD: Proof(lambda bench, method: loss_rows(bench, method) + convergence_rows(bench), tcd_rows),
    PCM: Proof(lambda bench, method: fixed_rows(bench, method) + convergence_rows(bench), trained_rows),
    CTM: Proof(
        lambda bench, method: ctm_fixed_rows(bench, method) + convergence_rows(bench, method.solver),
        ctm_rows,
        mixture=LINE,
        on_a_line=True,
    ),
    DMD: Proof(dmd_fixed_rows, dmd_rows, steps=PAIRED_STEPS),
    DMD2: Proof(_dmd2_fixed, matched_rows, STEPS, train_matched, RING, settings=one_step_start),
    Turbo: Proof(turbo_fixed_rows, steps=0),  # games whose end on a finite network nobody knows
    LADD: Proof(ladd_fixed_rows, steps=0),
    Lightning: Proof(lightning_fixed_rows, _lightning_trained),
    Feedback: Proof(feedback_fixed_rows, feedback_rows, FEEDBACK_STEPS, train_feedback, WIDE),
    Hyper: Proof(lambda bench, method: hyper_fixed_rows(bench, method) + convergence_rows(bench), hyper_rows),
}
