"""Sampling: samplers by name, `sample` to run them, and solvers for the teacher's ODE."""

from fewstep.sampling.sample import Trajectory, sample
from fewstep.sampling.samplers import (
    CTM,
    DDIM,
    LCM,
    SAMPLERS,
    TCD,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    Heun,
    Phased,
    Renoise,
    Sampler,
    make_sampler,
)
from fewstep.sampling.solvers import solve

__all__ = [
    "CTM",
    "DDIM",
    "LCM",
    "SAMPLERS",
    "TCD",
    "DPMSolverPP2M",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Phased",
    "Renoise",
    "Sampler",
    "Trajectory",
    "make_sampler",
    "sample",
    "solve",
]
