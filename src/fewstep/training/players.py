"""A player at work: its gradients, its clipping, its optimiser, its guard against numbers that are not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewstep.methods.base import Player
from fewstep.models.sharding import is_sharded, local, rows_of, whole
from fewstep.training import distributed
from fewstep.training.optimizers import load_state, make_optimizer, saved_state
from fewstep.training.settings import TrainingSettings


class PlayerState:
    """One player's parameters and optimiser.

    Gradients reach this player's parameters and nobody else's because `backward` names them; requires_grad is
    never toggled. A step whose gradient is not finite is skipped on the device, without asking the host, and
    remembered; so are all steps after it: weights stay those of the last good step until the host looks.

    With several processes each has the gradient of its own rows of the batch; `update` averages them. Of a sharded
    parameter a process updates the rows it has.

    Args:
        leaves: what stands for the parameters in a graph (`Roles.leaves`); themselves by default.
    """

    def __init__(
        self,
        player: Player,
        parameters: Sequence[nn.Parameter],
        settings: TrainingSettings,
        leaves: Callable[[Sequence[nn.Parameter]], Sequence[Tensor]] = list,
    ) -> None:
        if not parameters:
            raise ValueError(f"The player '{player.name}' has no trainable parameters.")
        self.player, self.parameters, self.settings = player, list(parameters), settings
        self.leaves = leaves
        self.mine = [nn.Parameter(local(p)) if is_sharded(p) else p for p in self.parameters]
        betas = settings.betas if player.name == "student" else settings.critic_betas or settings.betas
        self.optimizer = make_optimizer(self.mine, dataclasses.replace(settings, betas=betas))
        device = self.mine[0].device
        self.first_bad_step = torch.full((), float("inf"), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)

    def backward(self, total: Tensor, accumulation: int) -> None:
        """Add d(total / accumulation) to this player's gradients."""
        if accumulation > 1:
            total = total / accumulation
        total.backward(inputs=list(self.leaves(self.parameters)))

    def update(self, step: int) -> None:
        """Average over processes, clip, step, and forget the gradients; no synchronisation with the host."""
        self.grad_norm = norm = self._gather_gradients()
        bad = ~torch.isfinite(norm)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.mine, self.settings.max_grad_norm, norm)
        self.first_bad_step = torch.where(bad, self.first_bad_step.clamp_max(step), self.first_bad_step)
        self.optimizer.found_inf = self.first_bad_step.isfinite().to(torch.float32)
        self.optimizer.param_groups[0]["lr"] = self.settings.rate(step, self.player.name)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _gather_gradients(self) -> Tensor:
        """Make every gradient that of the whole batch; returns their total norm, the same in all processes."""
        shards = [(p, row) for p, row in zip(self.parameters, self.mine, strict=True) if row is not p]
        for parameter, row in shards:  # FSDP has averaged these in its backward
            row.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
        split = {id(row) for _, row in shards}
        kept = [p for p in self.mine if id(p) not in split and p.grad is not None]
        distributed.average_gradients(kept)
        norm = torch.nn.utils.get_total_norm([p.grad for p in kept if p.grad is not None])
        if not shards:
            return norm
        rows = torch.nn.utils.get_total_norm([row.grad for _, row in shards if row.grad is not None])
        return (norm.square() + distributed.total(rows.square())).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """Optimiser moments by parameter position: what a checkpoint must hold. Every process must call this."""
        return {
            f"{i}/{key}": whole(value, parameter)
            for i, (parameter, row) in enumerate(zip(self.parameters, self.mine, strict=True))
            for key, value in saved_state(self.optimizer, row).items()
        }

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave.

        Raises:
            ValueError: when the moments are not of this player's parameters.
        """
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in saved.items():
            index, _, name = key.partition("/")
            if not index.isdigit() or int(index) >= len(self.parameters):
                raise ValueError(f"The optimiser state of '{self.player.name}' belongs to another recipe.")
            parameter = self.parameters[int(index)]
            by_parameter.setdefault(index, {})[name] = value if name == "step" else rows_of(value, parameter)
        for index, state in by_parameter.items():
            try:
                load_state(self.optimizer, int(index), state)
            except ValueError as error:
                raise ValueError(f"The optimiser state of '{self.player.name}' {error}.") from None
