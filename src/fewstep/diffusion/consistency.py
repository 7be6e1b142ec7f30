"""The consistency function f(x, t): a combination of state and prediction that is the identity at the schedule's end.

======  ==========================================================  ==============================
family  f(x, t)                                                     source
======  ==========================================================  ==============================
vp      c_skip x + c_out x0, q = 10 t, c_skip = d^2/(q^2 + d^2),    LCM, sec. 4.1 and official code
        c_out = q/sqrt(q^2 + d^2), d = 0.5, t the table index       (timestep_scaling = 10)
flow    x0 = x - t flow: the identity at t = 0 as it stands         PCM's SD3 code with one phase
edm     c_skip x + c_out F with the times shifted by sigma_min      CM, sec. 3 and appendix C
======  ==========================================================  ==============================

On a VP table c_skip is 7e-6 at LCM's first training time 19: there the scalings mean only "if t is 0, return x".

Sources: LCM is Luo et al. 2023 (arXiv 2310.04378), PCM Wang et al. 2024 (2405.18407), CM Song et al. 2023 (2303.01469).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Array, Schedule, expand

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary_scalings(t: Array) -> tuple[Array, Array]:
    """LCM's (c_skip, c_out) at table index ``t`` (host float64, number or [B])."""
    q = np.maximum(np.asarray(t, dtype=np.float64), 0) * TIMESTEP_SCALING  # clean data, -1, lies beyond the end
    return np.asarray(SIGMA_DATA**2 / (q**2 + SIGMA_DATA**2)), np.asarray(q / np.sqrt(q**2 + SIGMA_DATA**2))


def coefficients(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """(a, b) of f(x, t) = a x + b x0, by family, in the shape of ``t`` (host float64, number or [B])."""
    t = np.asarray(t, dtype=np.float64)
    if schedule.family == "vp":
        return boundary_scalings(t)
    if schedule.family == "flow":
        clean = np.asarray(t == schedule.clean, dtype=np.float64)
        return clean, 1 - clean
    t = np.maximum(t, schedule.sigma_min)  # clean data, 0, lies beyond the end
    # F = (D - c_skip_edm x) / c_out_edm and c_out / c_out_edm = (t - sigma_min) / t
    c_skip = SIGMA_DATA**2 / ((t - schedule.sigma_min) ** 2 + SIGMA_DATA**2)
    c_edm = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
    ratio = (t - schedule.sigma_min) / t
    return np.asarray(c_skip - ratio * c_edm), np.asarray(ratio)


def consistency(prediction: Prediction) -> Tensor:
    """f(x, t) of the prediction's family (see the table above), same shape as x; exactly x at the end."""
    schedule, t, x = prediction.schedule, prediction.t, prediction.x
    if schedule.family == "flow":
        return prediction.at(schedule.clean)
    of_x, of_x0 = coefficients(schedule, t)
    return expand(of_x, x) * x + expand(of_x0, x) * prediction.x0
