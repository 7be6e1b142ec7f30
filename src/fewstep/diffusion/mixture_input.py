"""The parameters of a Gaussian mixture, checked, normalised and diagonalised; and their JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.diffusion.schedule import Array

KEYS = ("weights", "means", "stds", "covariances", "class_weights")
SLACK = 1e-3  # of a sum of weights around 1: files write 0.333; more is a mistake


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
    count, dim = len(w), mu.shape[1]
    if len(mu) != count:
        raise ValueError(f"means must hold one row for each of the {count} weights, not {len(mu)} rows.")
    if (stds is None) == (covariances is None):
        raise ValueError("A mixture needs exactly one of stds and covariances.")
    classes = None
    if class_weights is not None:
        classes = _normalised("class_weights", _array("class_weights", class_weights, (2,)))
        if classes.shape[1] != count:
            raise ValueError(f"class_weights must have shape [classes, {count}], not {list(classes.shape)}.")
    if stds is not None:
        std = _array("stds", stds, (1, 2))
        if std.shape not in ((count,), (count, dim)):
            raise ValueError(f"stds must have shape [{count}] or [{count}, {dim}], not {list(std.shape)}.")
        if (std <= 0).any():
            raise ValueError("stds must be positive.")
        return MixtureInput(w, mu, std, None, classes, std.reshape(count, -1) ** 2, None)
    covariance = _array("covariances", covariances, (3,))
    if covariance.shape != (count, dim, dim):
        raise ValueError(f"covariances must have shape {[count, dim, dim]}, not {list(covariance.shape)}.")
    return MixtureInput(w, mu, None, covariance, classes, *_diagonal(covariance))


def read(path: Path) -> dict[str, Any]:
    """The keyword arguments in a mixture's JSON file, their names checked.

    Raises:
        ValueError: one sentence, without the file's name.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("it is a pipe or a device, no file.")  # reading it might never end
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"it must hold one object with the keys {', '.join(KEYS)}.")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"unknown key '{key}': use {', '.join(KEYS)}.")
    for key in ("weights", "means"):
        if key not in content:
            raise ValueError(f"the key '{key}' is missing.")
    return content


def _array(name: str, value: Any, ndims: tuple[int, ...]) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        raw = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths.") from None
    if raw.size and raw.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold numbers only.")
    if raw.ndim not in ndims or raw.size == 0:
        shape = " or ".join(f"{n}-dimensional" for n in ndims)
        raise ValueError(f"{name} must be {shape} and not empty, not of shape {list(raw.shape)}.")
    array: Array = raw.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: it holds NaN or infinity.")
    return array


def _normalised(name: str, weights: Array) -> Array:
    if (weights < 0).any():
        raise ValueError(f"{name} must not be negative.")
    total = weights.sum(axis=-1, keepdims=True)
    if (np.abs(total - 1) > SLACK).any():
        wrong = total[np.abs(total - 1) > SLACK][0]
        raise ValueError(f"{name} must sum to 1{' in every row' if weights.ndim > 1 else ''}, not to {wrong:g}.")
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
