"""A student that is conditioned on its target time, as ordinary weights for the times of one run.

In a run of n steps the target time s is a function of the time t. The student reads it as a vector e_i that is added to
phi_i, the sinusoids of t_i, before the first linear layer V of the time embedding. With a matrix A of rank n and

    A phi_i = e_i,  i = 1, ..., n,

the layer V (1 + A) gives at these times, without the extra input, what V gave with it: in any program, as a weight or
as n more ranks of a LoRA on that layer. Other embeddings that are added there (a guidance scale) are a part of e_i.

Of all such A the one is taken that half precision disturbs least, for other programs round the time and its sinusoids
to 8 bits: it minimises tr(A K A^T), where K is the covariance of the error in phi. That is the generalised least
squares estimator, A = E (Phi^T K^-1 Phi)^+ Phi^T K^-1. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.families.network import leave, watched
from fewstep.models.quantize import plain
from fewstep.sampling import Sampler
from fewstep.students.card import Card, sampler_of

LIMIT = 1e-5
"""Largest error of a fold, as a part of what the target times change."""
_TIME, _FEATURE = 2.0**-8, 2.0**-9  # bfloat16's rounding of a time, as a part of all times, and of its sinusoids
_LEAST = 0.05  # a smaller change than this part of the output is measured against that part: float32 holds no less
_ZERO = 1e-9  # singular values below this part of the largest are rounding


@dataclass(frozen=True)
class Fold:
    """The matrix A of a student's grid, as left @ right.

    Attributes:
        layer: name of the first linear layer of the time embedding, among the network's parameters.
        targets: (t_i, s_i).
        left: [width, rank]. right: [rank, width].
        reads: [rows, width], what the layer reads on the grid without the extra inputs: phi.
        added: [rows, width], what the extra inputs add to it: e.
    """

    layer: str
    targets: tuple[tuple[float, float], ...]
    left: Tensor
    right: Tensor
    reads: Tensor
    added: Tensor

    def weight_of(self, network: Any) -> Tensor:
        """The layer's weight in a network without adapters."""
        return dict(network.named_parameters())[f"{self.layer}.weight"]

    def folded(self, weight: Tensor) -> Tensor:
        """The layer's weight V [out, width] as V (1 + A), in its own dtype.

        Raises:
            ValueError: one sentence: the error is above `LIMIT`.
        """
        before = weight.detach().double()
        after = (before + before @ self.left @ self.right).to(weight.dtype)
        self._check(before, after.double())
        return after

    def as_ranks(self, lora: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """``lora`` with A as further ranks on the layer, which it may adapt already.

        Args:
            weight: V [out, width] of the layer without the LoRA.

        Raises:
            ValueError: one sentence: the error is above `LIMIT`.
        """
        lora = {key: t for key, t in lora.items() if ".lora_" in key}
        if not self.left.shape[1]:  # the embeddings were never trained
            return lora
        keys = [f"{self.layer}.lora_{part}.weight" for part in "AB"]
        base = before = plain(weight).detach().double()
        own = [lora[key].double() for key in keys if key in lora]
        if own:
            before = base + own[1] @ own[0]
        more = _balanced(before @ self.left, self.right)
        down, up = (torch.cat([*own[i : i + 1], part], dim=i).float() for i, part in enumerate(more))
        self._check(before, base + up.double() @ down.double())
        return {**lora, keys[0]: down, keys[1]: up}

    def gap(self, before: Tensor, after: Tensor) -> float:
        """Largest error of the layer's output with the weight ``after``, as a part of what the extra inputs change."""
        wanted = (self.reads + self.added) @ before.T
        change = float((self.added @ before.T).abs().max())
        error = float((self.reads @ after.T - wanted).abs().max())
        return error / max(change, _LEAST * float(wanted.abs().max()), 1e-30)

    def _check(self, before: Tensor, after: Tensor) -> None:
        gap = self.gap(before, after)
        if not gap <= LIMIT:
            raise ValueError(
                f"The target times of {len(self.targets)} steps cannot be fixed in the weights of {self.layer}, which "
                f"tells these times apart too weakly (error {gap:.0e} of their effect): set fewer num_inference_steps "
                "in its few_step.json, or sample it with fewstep sample."
            )


def is_folded(card: Card) -> bool:
    """Whether an export of this student has its target times folded into its weights."""
    return "end" in card.extra_inputs


def refuse_fresh_noise(card: Card) -> None:
    """Refuse a student whose target times depend on more than the time.

    Raises:
        ValueError: one sentence: it is conditioned on its target time and sampled with fresh noise.
    """
    if is_folded(card) and (eta := sampler_of(card).fresh_noise):
        raise ValueError(
            "An export of a student that is conditioned on its target time holds the target times of a run without "
            f"fresh noise, and this one is sampled with eta {eta:g}."
        )


@torch.no_grad()
def fold_end(
    student: Denoiser, sampler: Sampler, x: Tensor, cond: Cond | None = None, guidance_embed: float | None = None
) -> Fold:
    """The fold of a student that is conditioned on its target time, for the run of ``sampler``.

    The network is called, up to the layer alone, at every time of the run with and without its extra inputs, and at
    times beside it: nothing about its family is known here.

    Args:
        x: a state [1, ...]. guidance_embed: scale for its guidance-scale embedding, if it has one.

    Raises:
        ValueError: one sentence: the network has no linear layer that reads the time.
    """
    name, layer = _first_layer(student)
    schedule, targets = student.schedule, sampler.targets(student.schedule)
    given = {"guidance_embed": guidance_embed} if guidance_embed is not None else {}
    given = {key: value for key, value in given.items() if key in student.accepts}
    extras = getattr(student.network, "extras", None)
    own = {key: value for key, value in given.items() if extras is None or key not in extras.names}

    def read(t: float, **inputs: Any) -> Tensor:
        return _read(layer, student, x, t, cond, inputs)

    reads, added, errors = [], [], []
    width = _TIME * abs(schedule.start - schedule.end)
    for t, end in targets:
        reads.append(read(t, **own))
        added.append(read(t, **given, end=end) - reads[-1])
        errors += [read(t + sign * width, **own) - reads[-1] for sign in (-1, 1)]
    phi, e = torch.cat(reads), torch.cat(added)
    return Fold(name, tuple(targets), *_solved(phi, e, torch.cat(errors), len(targets)), phi, e)


def _solved(phi: Tensor, e: Tensor, errors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left [width, rank], right [rank, width]) of the A that gives ``e`` [rows, width] of ``phi`` [rows, width].

    Args:
        errors: [any, width], by how much ``phi`` is off where its time is rounded.
    """
    _, sizes, basis = torch.linalg.svd(e, full_matrices=False)
    count = int((sizes[:rank] > _ZERO * sizes[0]).sum())
    left = basis[:count].T
    covariance = errors.T @ errors / len(errors)
    covariance += _FEATURE**2 * phi.square().mean() * torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, phi.T, upper=False)  # [width, rows]
    right = (e @ left).T @ torch.linalg.pinv(white, rtol=_ZERO)
    return left, torch.linalg.solve_triangular(root.T, right.T, upper=True).T


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) with the same product and columns of equal length, so that half precision holds both alike."""
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, sizes, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    half = sizes.sqrt()
    return half[:, None] * (v @ q_down.T), (q_up @ u) * half


def _first_layer(student: Denoiser) -> tuple[str, nn.Module]:
    """(name, module) of the first linear layer of the time embedding; an adapted one with its adapters."""
    network: Any = getattr(student.network, "network", student.network)
    inside = {id(part) for part in getattr(network, "time_embedder", nn.Identity()).modules()}
    for name, part in network.named_modules():
        if id(part) in inside and isinstance(part, nn.Linear) and ".lora_" not in name:
            name = name.removesuffix(".base_layer")
            return name, network.get_submodule(name)
    raise ValueError(_no_layer(student))


def _no_layer(student: Denoiser) -> str:
    network = getattr(student.network, "network", student.network)
    return (
        f"This student's target times cannot be fixed in its weights, for {type(network).__name__} has no linear layer "
        "that reads the time: sample it with fewstep sample."
    )


def _read(
    layer: nn.Module, student: Denoiser, x: Tensor, t: float, cond: Cond | None, inputs: Mapping[str, Any]
) -> Tensor:
    """What ``layer`` reads in one call of the student, [rows, width]; the call ends there."""
    seen: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:  # after the hook that adds the extra inputs
        seen.append(args[0].detach().double().flatten(0, -2).cpu())
        leave()

    handle = layer.register_forward_hook(look)
    try:
        with watched({}, {}, None):
            student(x, t, cond, **inputs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(_no_layer(student))
    return seen[0]
