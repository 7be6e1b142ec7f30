"""What a Gaussian mixture is made from: checked, normalised, diagonalised; and its JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.diffusion.schedule import Array

KEYS = ("weights", "means", "stds", "covariances", "class_weights")


@dataclass(frozen=True)
class MixtureInput:
    """Checked parameters, float64 (see `GaussianMixture` for shapes).

    Attributes:
        variances: along each component's own axes, [K, 1] (isotropic) or [K, D].
        basis: those axes as columns, [K, D, D]; None where they are the data's.
    """

    weights: Array
    means: Array
    stds: Array | None
    covariances: Array | None
    class_weights: Array | None
    variances: Array
    basis: Array | None

    @property
    def kind(self) -> str:
        if self.covariances is not None:
            return "full"
        return "isotropic" if self.variances.shape[1] == 1 and self.means.shape[1] > 1 else "diagonal"

    def as_dict(self) -> dict[str, Any]:
        """The given parameters as nested lists, for JSON."""
        return {key: getattr(self, key).tolist() for key in KEYS if getattr(self, key) is not None}


def check(weights: Any, means: Any, stds: Any, covariances: Any, class_weights: Any) -> MixtureInput:
    """Check and normalise the arguments of `GaussianMixture`.

    Raises:
        ValueError: one sentence naming the argument.
    """
    w = _normalised("weights", _array("weights", weights, (1,)))
    mu = _array("means", means, (1, 2))
    mu = mu[:, None] if mu.ndim == 1 else mu
    components, dim = len(w), mu.shape[1]
    if len(mu) != components or dim == 0:
        raise ValueError(f"means must hold one row for each of the {components} weights, not shape {list(mu.shape)}.")
    if (stds is None) == (covariances is None):
        raise ValueError("A mixture needs exactly one of stds and covariances.")
    classes = None
    if class_weights is not None:
        classes = _array("class_weights", class_weights, (2,))
        if classes.shape[1] != components or not len(classes):
            raise ValueError(f"class_weights must have shape [classes, {components}], not {list(classes.shape)}.")
        classes = _normalised("class_weights", classes)
    if stds is not None:
        std = _array("stds", stds, (1, 2))
        if std.shape not in ((components,), (components, dim)):
            raise ValueError(f"stds must have shape [{components}] or [{components}, {dim}], not {list(std.shape)}.")
        if (std <= 0).any():
            raise ValueError("stds must be positive.")
        variances = std[:, None] ** 2 if std.ndim == 1 else std**2
        return MixtureInput(w, mu, std, None, classes, variances, None)
    covariance = _array("covariances", covariances, (3,))
    if covariance.shape != (components, dim, dim):
        raise ValueError(f"covariances must have shape {[components, dim, dim]}, not {list(covariance.shape)}.")
    variances, basis = _diagonal(covariance)
    return MixtureInput(w, mu, None, covariance, classes, variances, basis)


def read(path: Path) -> dict[str, Any]:
    """The checked keyword arguments in a mixture's JSON file.

    Raises:
        ValueError: one sentence that names the file, and the key where one is to blame.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The mixture file {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"The mixture file {path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"The mixture file {path} must hold one object with the keys {', '.join(KEYS)}.")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"The mixture file {path} has an unknown key '{key}': use {', '.join(KEYS)}.")
    for key in ("weights", "means"):
        if key not in content:
            raise ValueError(f"The mixture file {path} lacks the key '{key}'.")
    try:
        check(**{key: content.get(key) for key in KEYS})
    except ValueError as error:
        raise ValueError(f"In the mixture file {path}: {error}") from None
    return content


def _array(name: str, value: Any, ndims: tuple[int, ...]) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        raw = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths.") from None
    if raw.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold numbers only.")
    if raw.ndim not in ndims or raw.size == 0:
        shape = " or ".join(f"{n}-dimensional" for n in ndims)
        raise ValueError(f"{name} must be {shape} and not empty, not of shape {list(raw.shape)}.")
    array: Array = raw.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: it holds NaN or infinity.")
    return array


def _normalised(name: str, weights: Array) -> Array:
    total = weights.sum(axis=-1, keepdims=True)
    if (weights < 0).any() or (total <= 0).any():
        raise ValueError(f"{name} must not be negative and must have a positive sum.")
    # weights that already sum to 1 (but for rounding) stay bit for bit: files round-trip
    return np.asarray(np.where(np.abs(total - 1) < 1e-15 * weights.shape[-1], weights, weights / total))


def _diagonal(covariances: Array) -> tuple[Array, Array]:
    """Variances [K, D] and axes [K, D, D] of symmetric positive definite matrices."""
    scale = np.abs(covariances).max(axis=(1, 2), keepdims=True)
    if (np.abs(covariances - covariances.transpose(0, 2, 1)) > 1e-10 * scale).any():
        raise ValueError("covariances must be symmetric.")
    variances, basis = np.linalg.eigh((covariances + covariances.transpose(0, 2, 1)) / 2)
    if (variances <= 1e-14 * scale[:, :, 0]).any():
        raise ValueError("covariances must be positive definite.")
    return np.asarray(variances), np.asarray(basis)
