"""Sampling: samplers by name, `sample` to run them, and solvers for the teacher's ODE."""

from fewstep.sampling.sample import Trajectory, sample
from fewstep.sampling.samplers import (
    SAMPLERS,
    CTMSampler,
    DDIMSampler,
    DPMSolverPP2MSampler,
    EulerAncestralSampler,
    EulerSampler,
    HeunSampler,
    LCMSampler,
    PhasedSampler,
    RenoiseSampler,
    Sampler,
    TCDSampler,
    make_sampler,
)
from fewstep.sampling.solvers import solve

__all__ = [
    "SAMPLERS",
    "CTMSampler",
    "DDIMSampler",
    "DPMSolverPP2MSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "HeunSampler",
    "LCMSampler",
    "PhasedSampler",
    "RenoiseSampler",
    "Sampler",
    "TCDSampler",
    "Trajectory",
    "make_sampler",
    "sample",
    "solve",
]
