"""The exact probability-flow map of a Gaussian mixture: what every few-step generator tries to learn.

============================  ==========================================================================
field                         how
============================  ==========================================================================
one component                 linear along its axes: sqrt(alpha_s^2 C + sigma_s^2) / sqrt(alpha_t^2 C + sigma_t^2)
one dimension, unguided       quantiles: F_s^-1(F_t(x)), solved to rounding
everything else               integrated, order 12, in the angle theta = atan2(sigma, alpha)
============================  ==========================================================================

Every schedule is one circle seen at different speeds and radii: with z = x / sqrt(alpha^2 + sigma^2), z moves by
``dz/dtheta = cos(theta) E[eps|x] - sin(theta) E[x0|x]`` (TrigFlow's time, Lu and Song 2024, with sigma_d = 1). It is
finite at both ends, clean data (0) and pure noise (pi/2), where alpha'(t) or log sigma are not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.diffusion import quantiles
from fewstep.diffusion.integrate import integrate
from fewstep.diffusion.schedule import Schedule, host

if TYPE_CHECKING:
    from fewstep.diffusion.mixture import GaussianMixture, Label


def flow_map(
    mixture: GaussianMixture,
    x: Tensor,
    schedule: Schedule,
    t: float,
    s: float,
    label: Label = None,
    guidance_scale: float | Tensor = 1.0,
) -> Tensor:
    """Map x (shapes as in `GaussianMixture`) along the probability flow from native time ``t`` to ``s``.

    Any order of times, `schedule.clean` and pure noise (flow's 1.0) included. With a guidance scale (number or
    [B]) the field is ``null + w (cond - null)`` at every x. No gradient passes through the map.

    Raises:
        ValueError: times outside the schedule, labels outside the classes, a state that is not finite.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (float(a), float(b)) for a, b in (schedule.alpha_sigma(float(host(time))) for time in (t, s))
    )
    scale = host(guidance_scale)
    with torch.no_grad():
        flat = mixture._flat(x)
        if not flat.isfinite().all():
            raise ValueError("The flow map needs finite states: these hold NaN or infinity.")
        if not len(flat) or (alpha_t, sigma_t) == (alpha_s, sigma_s):
            mapped = flat
        elif mixture.num_components == 1:
            mapped = _linear(mixture, flat, alpha_t, sigma_t, alpha_s, sigma_s)
        elif mixture.dim == 1 and (label is None or (scale == 1).all()):
            source = quantiles.noised(mixture, flat, alpha_t, sigma_t, label)
            target = quantiles.noised(mixture, flat, alpha_s, sigma_s, label)
            mapped = quantiles.transport(source, target, flat)
        else:
            start, stop = math.atan2(sigma_t, alpha_t), math.atan2(sigma_s, alpha_s)

            def velocity(z: Tensor, theta: float) -> Tensor:
                cos, sin = math.cos(theta), math.sin(theta)
                x0, epsilon = mixture.posterior(z, cos, sin, label, guidance_scale)
                return cos * epsilon - sin * x0

            z = integrate(velocity, flat / math.hypot(alpha_t, sigma_t), start, stop)
            mapped = z * math.hypot(alpha_s, sigma_s)
        return mixture._like(mapped, x)


def _linear(
    mixture: GaussianMixture, x: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float
) -> Tensor:
    """One Gaussian: its mean moves, deviations [B, D] stretch along its axes."""
    component = mixture.components.to(x.device)
    mean, variance = component.means[0], component.variances[0]
    basis = None if component.basis is None else component.basis[0]
    deviation = x - alpha_t * mean
    if basis is not None:
        deviation = deviation @ basis
    deviation = deviation * ((alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2)).sqrt()
    if basis is not None:
        deviation = deviation @ basis.T
    return alpha_s * mean + deviation
