"""Gaussian mixtures of any dimension in closed form: the exact teacher, its samples and its exact flow map.

For ``p_0 = sum_k w_k N(mu_k, C_k)`` and ``x_t = alpha x0 + sigma eps`` every component stays Gaussian,
``N(alpha mu_k, V_k)`` with ``V_k = alpha^2 C_k + sigma^2``, so with the responsibilities r_k of x_t

    E[x0 | x_t]  = sum_k r_k (mu_k + alpha C_k V_k^-1 (x_t - alpha mu_k))
    E[eps | x_t] = sigma sum_k r_k V_k^-1 (x_t - alpha mu_k) = -sigma grad log p_t(x_t)

Both are formed directly, so neither loses digits where the other is badly conditioned. They are linear in r:
classifier-free guidance, ``null + w (cond - null)`` at fixed x, is the same formula with guided weights r.
Everything is computed in float64; results come back in max(x.dtype, float32).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.diffusion import mixture_input, quantiles
from fewstep.diffusion.components import Components, Noised
from fewstep.diffusion.integrate import integrate
from fewstep.diffusion.prediction import check_prediction_type, mix
from fewstep.diffusion.schedule import Schedule, Time, expand, host

Label: TypeAlias = "int | Tensor | None"


class GaussianMixture:
    """A Gaussian mixture, its noised versions, and class-conditional forms that share its components.

    States x are [B, D], or [B, *event] with prod(event) = D, or [B] where D is 1; results have the same shape.
    ``alpha`` and ``sigma`` are numbers or [B]. ``label`` is None, one class, or [B] classes, where -1 (and
    None) means "no condition", the mixture with its own ``weights``.

    Args:
        weights: [K], not negative, summing to 1 (within 0.001; made exact here).
        means: [K, D], or [K] for one dimension.
        stds: standard deviations, [K] (isotropic) or [K, D] (diagonal); positive.
        covariances: [K, D, D], symmetric and positive definite. Give either this or ``stds``.
        class_weights: [C, K] component weights of each class, every row like ``weights``.

    Attributes:
        dim: D. num_components: K. num_classes: C, 0 without classes.
        weights, means: float64 tensors [K], [K, D].

    Raises:
        ValueError: one sentence that names the argument and what is wrong with it.
    """

    def __init__(
        self,
        weights: npt.ArrayLike | Tensor,
        means: npt.ArrayLike | Tensor,
        stds: npt.ArrayLike | Tensor | None = None,
        covariances: npt.ArrayLike | Tensor | None = None,
        class_weights: npt.ArrayLike | Tensor | None = None,
    ) -> None:
        given = mixture_input.check(weights, means, stds, covariances, class_weights)
        self.weights, self.means = torch.from_numpy(given.weights), torch.from_numpy(given.means)
        self.num_components, self.dim = given.means.shape
        self._given = given
        basis = None if given.basis is None else torch.from_numpy(given.basis)
        self.components = Components(self.means, torch.from_numpy(given.variances), basis)
        rows = [given.weights[None]] if given.class_weights is None else [given.class_weights, given.weights[None]]
        self._table = torch.from_numpy(np.concatenate(rows))  # the last row is "no condition": index -1
        self.num_classes = len(self._table) - 1

    # ---------------------------------------------------------------- construction

    @classmethod
    def ring(
        cls, modes: int = 8, radius: float = 1.0, std: float = 0.1, num_classes: int | None = None
    ) -> GaussianMixture:
        """Equal modes on a circle in the plane; with ``num_classes`` = C, mode k belongs to class k mod C."""
        angle = 2 * np.pi * np.arange(modes) / modes
        means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        classes = None
        if num_classes is not None:
            classes = np.equal.outer(np.arange(num_classes), np.arange(modes) % num_classes).astype(np.float64)
            classes /= classes.sum(axis=1, keepdims=True)
        return cls(np.full(modes, 1 / modes), means, np.full(modes, std), class_weights=classes)

    @classmethod
    def from_json(cls, path: str | Path) -> GaussianMixture:
        """Read ``{"weights", "means", "stds" | "covariances", "class_weights"}``.

        Raises:
            ValueError: one sentence that names the file and the offending key.
        """
        try:
            return cls(**mixture_input.read(Path(path)))
        except ValueError as error:
            raise ValueError(f"Mixture file {path}: {error}") from None

    def to_json(self, path: str | Path) -> None:
        """Write what `from_json` reads back, to the last bit."""
        Path(path).write_text(json.dumps(self._given.as_dict(), indent=2) + "\n", encoding="utf-8")

    # ---------------------------------------------------------------- posterior

    def posterior(
        self, x: Tensor, alpha: Time, sigma: Time, label: Label = None, guidance_scale: Time = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(E[x0 | x_t], E[eps | x_t]) of the field ``null + w (cond - null)``, both shaped like x.

        At sigma = 0 x0 is x / alpha exactly (and eps its prior mean 0); at alpha = 0 it is the prior mean.
        """
        flat = self._flat(x)
        noised = self._noised(x, alpha, sigma)
        r = self._weigh(noised, label, guidance_scale)
        s = self._coefficient(sigma, flat)
        x0 = noised.posterior_mean(r)
        if (host(sigma) == 0).any():
            x0 = torch.where(s == 0, flat / torch.where(s == 0, noised.alpha, 1.0), x0)
        return self._like(x0, x), self._like(s * noised.minus_score(r), x)

    def x0(self, x: Tensor, alpha: Time, sigma: Time, label: Label = None, guidance_scale: Time = 1.0) -> Tensor:
        """Posterior mean E[x0 | x_t], shaped like x (see `posterior`)."""
        return self.posterior(x, alpha, sigma, label, guidance_scale)[0]

    def score(self, x: Tensor, alpha: Time = 1.0, sigma: Time = 0.0, label: Label = None) -> Tensor:
        """grad log p_t(x), shaped like x; defined at sigma = 0 too."""
        noised = self._noised(x, alpha, sigma)
        return self._like(-noised.minus_score(self._weigh(noised, label)), x)

    def log_prob(self, x: Tensor, alpha: Time = 1.0, sigma: Time = 0.0, label: Label = None) -> Tensor:
        """log p_t(x), [B], in nats."""
        noised = self._noised(x, alpha, sigma)
        joint = noised.log_likelihood + self.class_weights_of(label, x.device).log()
        return torch.logsumexp(joint, dim=-1).to(torch.promote_types(x.dtype, torch.float32))

    def responsibilities(self, x: Tensor, alpha: Time = 1.0, sigma: Time = 0.0, label: Label = None) -> Tensor:
        """p(component | x_t), [B, K]."""
        noised = self._noised(x, alpha, sigma)
        return self._weigh(noised, label).to(torch.promote_types(x.dtype, torch.float32))

    def assign(self, x: Tensor, label: Label = None) -> Tensor:
        """Index of the component most responsible for clean data x, int64 [B]."""
        return self.responsibilities(x, label=label).argmax(dim=-1)

    # ---------------------------------------------------------------- samples

    def sample(self, n: int, generator: torch.Generator | None = None, label: Label = None) -> Tensor:
        """n clean samples, float64 [n, D] on the generator's device (CPU without one)."""
        device = torch.device("cpu") if generator is None else generator.device
        weights = self.class_weights_of(label, device).expand(n, -1)
        which = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64, device=device)
        components = self.components.to(device)
        noise = noise * components.variances.sqrt()[which]
        if components.basis is not None:
            noise = torch.einsum("be,bde->bd", noise, components.basis[which])
        return components.means[which] + noise

    def sample_at(
        self, n: int, schedule: Schedule, t: Time, generator: torch.Generator | None = None, label: Label = None
    ) -> Tensor:
        """n samples of p_t at native time ``t`` (number or [n]), float64 [n, D]."""
        x0 = self.sample(n, generator, label)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        return schedule.add_noise(x0, noise, t)

    # ---------------------------------------------------------------- flow map and network

    def flow_map(
        self,
        x: Tensor,
        schedule: Schedule,
        t: float,
        s: float,
        label: Label = None,
        guidance_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Exact probability-flow map of x from native time ``t`` to ``s``, shaped like x: what students approximate.

        ============================  ======================================================================
        field                         how
        ============================  ======================================================================
        one component                 linear along its axes: deviations stretch by the ratio of the stds
        one dimension, unguided       quantiles, ``F_s^-1(F_t(x))``, solved to rounding
        everything else               integrated, order 12, in the angle theta = atan2(sigma, alpha)
        ============================  ======================================================================

        Every schedule is one circle seen at different speeds and radii: with z = x / sqrt(alpha^2 + sigma^2), z moves
        by ``dz/dtheta = cos(theta) E[eps|x] - sin(theta) E[x0|x]`` (TrigFlow's time, Lu and Song 2024, with
        sigma_d = 1). It is finite at both ends, clean data (0) and pure noise (pi/2), where alpha'(t) or log sigma
        are not.

        Any order of times, `schedule.clean` and pure noise (flow's 1.0) included. With a guidance scale (number or
        [B]) the field is ``null + w (cond - null)`` at every x. No gradient passes through the map. Its absolute error
        is below 1e-8 wherever the map itself does not amplify rounding (between far modes it does: its slope is
        p_t / p_s).

        Raises:
            ValueError: times outside the schedule, labels outside the classes, a state that is not finite.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            (float(a), float(b)) for a, b in (schedule.alpha_sigma(float(host(time))) for time in (t, s))
        )
        scale = host(guidance_scale)
        with torch.no_grad():
            flat = self._flat(x)
            if not flat.isfinite().all():
                raise ValueError("The flow map needs finite states: these hold NaN or infinity.")
            if not len(flat) or (alpha_t, sigma_t) == (alpha_s, sigma_s):
                mapped = flat
            elif self.num_components == 1:
                mapped = self._stretch(flat, alpha_t, sigma_t, alpha_s, sigma_s)
            elif self.dim == 1 and (label is None or (scale == 1).all()):
                source = self._line(flat, alpha_t, sigma_t, label)
                target = self._line(flat, alpha_s, sigma_s, label)
                mapped = quantiles.transport(source, target, flat)
            else:
                start, stop = math.atan2(sigma_t, alpha_t), math.atan2(sigma_s, alpha_s)

                def velocity(z: Tensor, theta: float) -> Tensor:
                    cos, sin = math.cos(theta), math.sin(theta)
                    x0, epsilon = self.posterior(z, cos, sin, label, guidance_scale)
                    return cos * epsilon - sin * x0

                z = integrate(velocity, flat / math.hypot(alpha_t, sigma_t), start, stop)
                mapped = z * math.hypot(alpha_s, sigma_s)
            return self._like(mapped, x)

    def network(self, schedule: Schedule, prediction_type: str = "epsilon") -> MixtureNetwork:
        """The exact network of that kind ("epsilon", "v_prediction", "sample", "flow"), for a `Denoiser`."""
        return MixtureNetwork(self, schedule, prediction_type)

    def __repr__(self) -> str:
        return f"GaussianMixture(num_components={self.num_components}, dim={self.dim}, num_classes={self.num_classes})"

    # ---------------------------------------------------------------- inside

    def class_weights_of(self, label: Label, device: torch.device | None = None) -> Tensor:
        """Component weights given ``label``: [K] for None or one class, [B, K] for [B] classes.

        Raises:
            ValueError: for a label outside -1 ... C - 1.
        """
        table = self._table if device is None else self._table.to(device)
        index = torch.as_tensor(-1 if label is None else label, device=table.device)
        if index.numel() and (int(index.min()) < -1 or int(index.max()) >= self.num_classes):
            raise ValueError(
                f"Labels of this mixture run from -1 (no condition) to {self.num_classes - 1}: "
                f"it has {self.num_classes} classes."
            )
        weights: Tensor = table[index.long()]
        return weights

    def _stretch(self, x: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> Tensor:
        """One Gaussian: its mean moves, deviations [B, D] stretch along its axes."""
        component = self.components.to(x.device)
        mean, variance = component.means[0], component.variances[0]
        basis = None if component.basis is None else component.basis[0]
        deviation = x - alpha_t * mean
        if basis is not None:
            deviation = deviation @ basis
        deviation = deviation * ((alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2)).sqrt()
        if basis is not None:
            deviation = deviation @ basis.T
        return alpha_s * mean + deviation

    def _line(self, flat: Tensor, alpha: float, sigma: float, label: Label) -> quantiles.Line:
        """This mixture, of one dimension, at one noise level, for states [B, 1]."""
        a, s = self._coefficient(alpha, flat), self._coefficient(sigma, flat)
        means, variances = self.means[:, 0].to(flat.device), self.components.variances[:, 0].to(flat.device)
        return quantiles.noised(self.class_weights_of(label, flat.device), means, variances, a, s)

    def _noised(self, x: Tensor, alpha: Time, sigma: Time) -> Noised:
        a, s = self._coefficient(alpha, x), self._coefficient(sigma, x)
        return Noised(self.components.to(x.device), self._flat(x), a, s)

    def _weigh(self, noised: Noised, label: Label, guidance_scale: Time = 1.0) -> Tensor:
        """Responsibilities [B, K]; guided ones may be negative, their sum is still 1."""
        evidence = noised.log_likelihood
        conditional = torch.softmax(evidence + self.class_weights_of(label, evidence.device).log(), dim=-1)
        if label is None or (host(guidance_scale) == 1).all():
            return conditional
        null = torch.softmax(evidence + self.class_weights_of(None, evidence.device).log(), dim=-1)
        return null + self._coefficient(guidance_scale, evidence) * (conditional - null)

    def _flat(self, x: Tensor) -> Tensor:
        """x as float64 [B, D]."""
        if x.ndim == 0 or math.prod(x.shape[1:]) != self.dim:
            raise ValueError(f"This mixture has dimension {self.dim}: a state of shape {list(x.shape)} does not fit.")
        return x.reshape(x.shape[0], self.dim).to(torch.float64)

    @staticmethod
    def _like(value: Tensor, x: Tensor) -> Tensor:
        """A float64 result in x's shape and working dtype."""
        return value.reshape(x.shape).to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def _coefficient(value: Time, x: Tensor) -> Tensor:
        """A number or [B] as float64 [1 or B, 1] on x's device."""
        return torch.from_numpy(np.atleast_1d(host(value)).copy()).to(x.device)[:, None]


class MixtureNetwork:
    """A mixture's exact output as ``network(x, t, cond=None)``, for `Denoiser`.

    The class is read from ``cond["label"]``, int [B], where -1 means "no condition"; so a condition that can be
    guided is ``Cond({"label": labels}, null={"label": torch.tensor([-1])})``. Without cond (or without that
    name in it) the mixture is unconditional.
    """

    def __init__(self, mixture: GaussianMixture, schedule: Schedule, prediction_type: str = "epsilon") -> None:
        self.mixture, self.schedule = mixture, schedule
        self.prediction_type = check_prediction_type(prediction_type)

    def __call__(self, x: Tensor, t: Time, cond: Any = None) -> Tensor:
        """Output at x [B, ...] and native time ``t`` (number or [B]), shaped like x, at least float32."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0, epsilon = self.mixture.posterior(x.to(torch.float64), alpha, sigma, self._label(cond))
        p, q = mix(self.prediction_type, alpha, sigma)
        return (expand(p, x0) * x0 + expand(q, x0) * epsilon).to(torch.promote_types(x.dtype, torch.float32))

    @property
    def tap_channels(self) -> dict[str, int]:
        """Taps for a discriminator, with their channels; see `features`."""
        return {"posterior": 2 * self.mixture.dim + self.mixture.num_components}

    def features(self, x: Tensor, t: Time, cond: Any, taps: Iterable[str]) -> list[Tensor]:
        """The one tap, "posterior" [B, 2 D + K]: E[x0 | x_t], E[eps | x_t] and the responsibilities."""
        label = self._label(cond)
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0, epsilon = self.mixture.posterior(x, alpha, sigma, label)
        r = self.mixture.responsibilities(x, alpha, sigma, label)
        return [torch.cat([x0.flatten(1), epsilon.flatten(1), r], dim=1) for _ in taps]

    @staticmethod
    def _label(cond: Any) -> Label:
        return cond["label"] if cond is not None and "label" in cond else None
