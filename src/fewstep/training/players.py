"""A player's gradients, clipping, optimiser, and its guard against numbers that are not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.methods.base import Balanced, Loss, Player
from fewstep.models.sharding import is_sharded, local, rows_in, whole
from fewstep.training import distributed
from fewstep.training.optimizers import load_state, make_optimizer, saved_state
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import learn


class PlayerState:
    """One player's parameters and optimiser.

    Gradients reach the parameters of this player alone because `backward` names them; requires_grad is never toggled.
    A step whose gradient is not finite is skipped on the device, without asking the host, and remembered; all later
    steps are skipped too: the weights stay those of the last good step until the host reads the guard.

    Each of several processes has the gradient of its own rows of the batch; `update` averages them. A process updates
    only its own rows of a sharded parameter.

    Args:
        leaves: the leaves of a graph that stand for the parameters (`Roles.leaves`); themselves by default.
        probe: the parameter whose gradients balance terms (`Roles.probe`); the last one by default.

    Attributes:
        grad_norm: total gradient norm at the last update, before clipping.
        first_bad_step: the first step whose gradient was not finite; infinity while there is none.
        weights: weights of the balanced terms at the last update.
    """

    def __init__(
        self,
        player: Player,
        parameters: Sequence[nn.Parameter],
        settings: TrainingSettings,
        leaves: Callable[[Sequence[nn.Parameter]], Sequence[Tensor]] = list,
        probe: nn.Parameter | None = None,
    ) -> None:
        if not parameters:
            raise ValueError(f"The player '{player.name}' has no trainable parameters.")
        self.player, self.parameters, self.settings = player, list(parameters), settings
        self.leaves = leaves
        self.mine = [nn.Parameter(local(p)) if is_sharded(p) else p for p in self.parameters]
        betas = settings.betas if player.name == "student" else settings.critic_betas or settings.betas
        self.optimizer = make_optimizer(self.mine, dataclasses.replace(settings, betas=betas))
        device = self.mine[0].device
        # float32, which every device has, holds the number of a step exactly up to 16.7 million
        self.first_bad_step = torch.full((), float("inf"), dtype=torch.float32, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self._probe = next((i for i, p in enumerate(self.parameters) if p is probe), -1)
        self._terms: dict[str, tuple[Balanced, list[Tensor | None]]] = {}
        self.weights: dict[str, Tensor] = {}

    def rate(self, step: int) -> float:
        """The learning rate at ``step``."""
        return self.settings.rate(step, self.player.name, self.player.rate, self.player.start)

    def learn(self, loss: Loss, accumulation: int) -> Loss:
        """`backward` of a loss and of all that follow it (`fewstep.training.step.learn`)."""
        return learn(loss, lambda term: self.backward(term.total, accumulation, term.balanced))

    def backward(self, total: Tensor, accumulation: int, balanced: Mapping[str, Balanced] | None = None) -> None:
        """Add d(total / accumulation) to this player's gradients; those of balanced terms are kept apart.

        A term's weight is the ratio of two gradient norms of the *whole* batch, so it is known only after the last
        micro-batch and the last process: until `update`, the gradients of every term are summed by themselves.
        """
        inputs, left = list(self.leaves(self.parameters)), len(balanced or {})
        if accumulation > 1:
            total = total / accumulation
        total.backward(inputs=inputs, retain_graph=left > 0)
        for name, balance in (balanced or {}).items():
            left -= 1
            # autograd adds to `.grad`: lend it this term's sum for one backward, then put the total's back
            of_others = self._exchange(self._terms[name][1] if name in self._terms else [None] * len(self.parameters))
            (balance.term / accumulation).backward(inputs=inputs, retain_graph=left > 0)
            self._terms[name] = balance, self._exchange(of_others)

    def update(self, step: int) -> None:
        """Average over processes, clip, step, and drop the gradients; no synchronisation with the host."""
        self._balance()
        self.grad_norm = norm = self._norm()
        bad = ~torch.isfinite(norm)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.mine, self.settings.max_grad_norm, norm)
        self.first_bad_step = torch.where(bad, self.first_bad_step.clamp_max(step), self.first_bad_step)
        self.optimizer.found_inf = self.first_bad_step.isfinite().to(torch.float32)
        self.optimizer.param_groups[0]["lr"] = self.rate(step)
        self.optimizer.step()
        torch.autograd.graph.increment_version(self.mine)  # fused updates do not count as changes, see Shadow
        self.optimizer.zero_grad(set_to_none=True)

    def _exchange(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Give the parameters these gradients; returns those they had."""
        before = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return before

    def _balance(self) -> None:
        """Replace the gradients by those of the whole batch, all terms summed with their weights (`Balanced`)."""
        terms, self._terms, self.weights = self._terms, {}, {}
        of_total = self._gather_gradients()
        for name, (balance, gradients) in terms.items():
            self._exchange(gradients)
            of_term = self._gather_gradients()
            ratio = self._probe_norm(of_total) / (self._probe_norm(of_term) + 1e-4)
            self.weights[name] = weight = balance.scale * ratio.clamp(balance.low, balance.high)
            pairs = zip(of_total, of_term, strict=True)  # either may miss a parameter that it does not depend on
            of_total = [a if b is None else weight * b if a is None else a + weight * b for a, b in pairs]
        for row, gradient in zip(self.mine, of_total, strict=True):
            row.grad = gradient

    def _gather_gradients(self) -> list[Tensor | None]:
        """The whole batch's gradients of this process's rows, taken off the parameters."""
        shards = [(p, row) for p, row in zip(self.parameters, self.mine, strict=True) if row is not p]
        for parameter, row in shards:  # FSDP has averaged these in its backward
            row.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
        split = {id(row) for _, row in shards}
        distributed.average_gradients([p for p in self.mine if id(p) not in split and p.grad is not None])
        gradients = [row.grad for row in self.mine]
        for row in self.mine:
            row.grad = None
        return gradients

    def _probe_norm(self, gradients: list[Tensor | None]) -> Tensor:
        """Norm of the probe's gradient, the same in all processes."""
        found, row = gradients[self._probe], self.mine[self._probe]
        square = row.new_zeros(()) if found is None else found.square().sum()
        return (square if row is self.parameters[self._probe] else distributed.total(square)).sqrt()

    def _norm(self) -> Tensor:
        """Total norm of the gradients, the same in all processes."""
        pairs = list(zip(self.parameters, self.mine, strict=True))
        norm = torch.nn.utils.get_total_norm([row.grad for p, row in pairs if row is p and row.grad is not None])
        shards = [row.grad for p, row in pairs if row is not p and row.grad is not None]
        if all(row is p for p, row in pairs):
            return norm
        # every process holds whole parameters in full, and other rows of the sharded ones: sum the squares of those
        return (norm.square() + distributed.total(torch.nn.utils.get_total_norm(shards).square())).sqrt()

    def tensors(self, gather: Any = whole) -> dict[str, Any]:
        """Optimiser moments by parameter position: what a checkpoint must hold. Every process must call this.

        Args:
            gather: as of `Trainer.tensors`.
        """
        return {
            f"{i}/{key}": gather(value, parameter)
            for i, (parameter, row) in enumerate(zip(self.parameters, self.mine, strict=True))
            for key, value in saved_state(self.optimizer, row).items()
        }

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave.

        Raises:
            ValueError: when the moments are not of this player's parameters.
        """
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key in saved:
            index, _, name = key.partition("/")
            if not index.isdigit() or int(index) >= len(self.parameters):
                raise ValueError(f"The optimiser state of '{self.player.name}' belongs to another recipe.")
            parameter = self.parameters[int(index)]
            by_parameter.setdefault(index, {})[name] = saved[key] if name == "step" else rows_in(saved, key, parameter)
        for index, state in by_parameter.items():
            try:
                load_state(self.optimizer, int(index), state)
            except ValueError as error:
                raise ValueError(f"The optimiser state of '{self.player.name}' {error}.") from None
