"""The components of a noised Gaussian mixture: their likelihoods, and the sums over them."""

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

    def to(self, device: torch.device) -> Components:
        """The same components on ``device``; itself if they already are there."""
        if device == self.means.device:
            return self
        basis = None if self.basis is None else self.basis.to(device)
        return Components(self.means.to(device), self.variances.to(device), basis)


class Noised:
    """Components at one noise level per row, N(alpha mu_k, V_k) with V_k = alpha^2 C_k + sigma^2, at states x.

    Axes come first, [D, B, K]: adding D planes is several times faster than summing rows of two or three numbers.

    Args:
        x: [B, D]. alpha, sigma: [1 or B, 1].

    Attributes:
        difference: x - alpha mu_k along the component's axes, [D, B, K].
        variance: the diagonal of V_k along them, [1 or D, 1 or B, K].
        log_likelihood: log N(x; alpha mu_k, V_k), [B, K].
    """

    def __init__(self, components: Components, x: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        self.components, self.alpha = components, alpha
        self.difference = x.T[:, :, None] - alpha * components.means.T[:, None, :]
        if components.basis is not None:
            self.difference = torch.einsum("dbk,kde->ebk", self.difference, components.basis)
        self.variance = alpha**2 * components.variances.T[:, None, :] + sigma**2
        dim = x.shape[1]
        distance = (self.difference.square() / self.variance).sum(0)
        log_det = self.variance.log().expand(dim, -1, -1).sum(0)
        self.log_likelihood = -0.5 * (distance + log_det + dim * math.log(2 * math.pi))

    def minus_score(self, r: Tensor) -> Tensor:
        """sum_k r_k V_k^-1 (x - alpha mu_k), [B, D], for weights r [B, K]; sigma times it is E[eps | x]."""
        return self._total(r / self.variance)

    def posterior_mean(self, r: Tensor) -> Tensor:
        """sum_k r_k (mu_k + alpha C_k V_k^-1 (x - alpha mu_k)), [B, D]: the posterior mean E[x0 | x]."""
        gain = self.components.variances.T[:, None, :] / self.variance
        return r @ self.components.means + self.alpha * self._total(r * gain)

    def _total(self, gain: Tensor) -> Tensor:
        """sum_k U_k gain_k U_k^T (x - alpha mu_k) for gains along the components' axes [1 or D, B, K]."""
        if self.components.basis is None:
            return (gain * self.difference).sum(-1).T
        return torch.einsum("ebk,kde->bd", gain * self.difference, self.components.basis)
