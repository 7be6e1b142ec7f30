"""fewstep turns any diffusion model into one that needs 1-8 steps.

The names below are the public ones; each is imported when it is first used, so ``import fewstep`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.data.batch import Batch
    from fewstep.diffusion.mixture import GaussianMixture
    from fewstep.diffusion.prediction import Prediction
    from fewstep.diffusion.schedule import Schedule
    from fewstep.inference.load import load
    from fewstep.inference.model import Model
    from fewstep.methods.base import Loss, Method, Player, Progress, RoleSpec
    from fewstep.models.cond import Cond
    from fewstep.models.denoiser import Denoiser, edm_precondition
    from fewstep.models.families import Teacher, as_teacher, load_teacher
    from fewstep.models.roles import Roles, Weights
    from fewstep.sampling import (
        CTMSampler,
        DDIMSampler,
        DPMSolverPP2MSampler,
        EulerAncestralSampler,
        EulerSampler,
        HeunSampler,
        LCMSampler,
        PhasedSampler,
        TCDSampler,
        Trajectory,
        sample,
        solve,
    )
    from fewstep.training.settings import TrainingSettings
    from fewstep.training.trainer import Trainer, build_roles
    from fewstep.verification.verify import verify

_HOME = {
    "diffusion.mixture": ("GaussianMixture",),
    "diffusion.prediction": ("Prediction",),
    "diffusion.schedule": ("Schedule",),
    "inference.load": ("load",),
    "inference.model": ("Model",),
    "verification.verify": ("verify",),
    "data.batch": ("Batch",),
    "methods.base": ("Loss", "Method", "Player", "Progress", "RoleSpec"),
    "models.cond": ("Cond",),
    "models.denoiser": ("Denoiser", "edm_precondition"),
    "models.families": ("Teacher", "as_teacher", "load_teacher"),
    "models.roles": ("Roles", "Weights"),
    "sampling": (
        "CTMSampler", "DDIMSampler", "DPMSolverPP2MSampler", "EulerAncestralSampler", "EulerSampler", "HeunSampler",
        "LCMSampler", "PhasedSampler", "TCDSampler", "Trajectory", "sample", "solve",
    ),
    "training.settings": ("TrainingSettings",),
    "training.trainer": ("Trainer", "build_roles"),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}
_FORMER = (
    "CTM", "DDIM", "DPMSolverPP2M", "Euler", "EulerAncestral", "Heun", "LCM", "Phased", "TCD",
)  # fmt: skip
"""Samplers that had no ``Sampler`` at the end of their names before: methods have these names."""

__all__ = [
    "Batch",
    "CTMSampler",
    "Cond",
    "DDIMSampler",
    "DPMSolverPP2MSampler",
    "Denoiser",
    "EulerAncestralSampler",
    "EulerSampler",
    "GaussianMixture",
    "HeunSampler",
    "LCMSampler",
    "Loss",
    "Method",
    "Model",
    "PhasedSampler",
    "Player",
    "Prediction",
    "Progress",
    "RoleSpec",
    "Roles",
    "Schedule",
    "TCDSampler",
    "Teacher",
    "Trainer",
    "TrainingSettings",
    "Trajectory",
    "Weights",
    "as_teacher",
    "build_roles",
    "edm_precondition",
    "load",
    "load_teacher",
    "sample",
    "solve",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fewstep")
    if name in _FORMER:
        raise AttributeError(f"The sampler fewstep.{name} is called fewstep.{name}Sampler now.")
    if name not in _MODULE:
        raise AttributeError(f"module 'fewstep' has no attribute '{name}'")
    return getattr(import_module(f"fewstep.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
