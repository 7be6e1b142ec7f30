"""The components of a noised Gaussian mixture: their likelihoods and the sums over them, each in one place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Components:
    """N(mu_k, C_k) for k = 1 ... K, C_k diagonal along the component's own axes; float64 throughout.

    Args:
        means: mu, [K, D].
        variances: [K, 1] (isotropic) or [K, D].
        basis: the axes as columns, [K, D, D]; None where they are the data's.
    """

    def __init__(self, means: Tensor, variances: Tensor, basis: Tensor | None) -> None:
        self.means, self.variances, self.basis = means, variances, basis
        self.isotropic = variances.shape[1] == 1 and basis is None

    def to(self, device: torch.device) -> Components:
        """The same on ``device``; itself where it already lies there."""
        if device == self.means.device:
            return self
        basis = None if self.basis is None else self.basis.to(device)
        return Components(self.means.to(device), self.variances.to(device), basis)

    def at(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Noised:
        """Seen from states x [B, D] at alpha, sigma [1 or B, 1]."""
        return Noised(self, x, alpha, sigma)


class Noised:
    """Components at one noise level per row, N(alpha mu_k, V_k) with V_k = alpha^2 C_k + sigma^2, seen from x.

    Attributes:
        log_likelihood: log N(x; alpha mu_k, V_k), [B, K].
        variance: the diagonal of V_k along the component's axes, [1 or B, K, 1 or D].
    """

    def __init__(self, components: Components, x: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        self.components, self.x, self.alpha = components, x, alpha
        self.variance = alpha[:, :, None] ** 2 * components.variances + sigma[:, :, None] ** 2
        dim = x.shape[1]
        if components.isotropic:
            # axes first: adding D planes [B, K] is several times faster than summing rows of two or three numbers
            difference = x.T[:, :, None] - alpha * components.means.T[:, None, :]
            variance = self.variance[..., 0]
            distance, log_det = difference.square().sum(0) / variance, dim * variance.log()
        else:
            self.difference = x[:, None, :] - alpha[:, :, None] * components.means
            if components.basis is not None:
                self.difference = torch.einsum("bkd,kde->bke", self.difference, components.basis)
            distance = (self.difference.square() / self.variance).sum(-1)
            log_det = self.variance.log().sum(-1)
        self.log_likelihood = -0.5 * (distance + log_det + dim * math.log(2 * math.pi))

    def pull(self, r: Tensor) -> Tensor:
        """sum_k r_k V_k^-1 (x - alpha mu_k), [B, D], for weights r [B, K]: minus the score."""
        return self._total(r, 1 / self.variance)

    def shrunk(self, r: Tensor) -> Tensor:
        """sum_k r_k (mu_k + alpha C_k V_k^-1 (x - alpha mu_k)), [B, D]: the posterior mean of clean data."""
        gain = self.components.variances / self.variance
        return r @ self.components.means + self.alpha * self._total(r, gain)

    def _total(self, r: Tensor, gain: Tensor) -> Tensor:
        """sum_k r_k U_k gain_k U_k^T (x - alpha mu_k)."""
        if self.components.isotropic:
            scaled = r * gain[..., 0]
            return scaled.sum(1, keepdim=True) * self.x - self.alpha * (scaled @ self.components.means)
        weighted = r[:, :, None] * gain * self.difference
        if self.components.basis is None:
            return weighted.sum(1)
        return torch.einsum("bke,kde->bd", weighted, self.components.basis)
