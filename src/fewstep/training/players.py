"""A player at work: its gradients, its clipping, its optimiser, its guard against numbers that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.methods.base import Player
from fewstep.training.settings import TrainingSettings


class PlayerState:
    """One player's parameters and fused AdamW.

    Gradients reach this player's parameters and nobody else's because `backward` names them; requires_grad is
    never toggled. A step whose gradient is not finite is skipped on the device, without asking the host, and
    remembered; so are all steps after it: weights stay those of the last good step until the host looks.
    """

    def __init__(self, player: Player, parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> None:
        if not parameters:
            raise ValueError(f"The player '{player.name}' has no trainable parameters.")
        self.player, self.parameters, self.settings = player, list(parameters), settings
        critics = settings.critic_betas if player.name != "student" else None
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=critics or settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        device = self.parameters[0].device
        self.first_bad_step = torch.full((), float("inf"), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)

    def backward(self, total: Tensor, accumulation: int) -> None:
        """Add d(total / accumulation) to this player's gradients."""
        if accumulation > 1:
            total = total / accumulation
        total.backward(inputs=self.parameters)

    def update(self, step: int) -> None:
        """Clip, step, and forget the gradients; no synchronisation with the host."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.grad_norm = norm = torch.nn.utils.get_total_norm(gradients)
        bad = ~torch.isfinite(norm)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        self.first_bad_step = torch.where(bad, self.first_bad_step.clamp_max(step), self.first_bad_step)
        self.optimizer.found_inf = self.first_bad_step.isfinite().to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.param_groups[0]["lr"] = self.settings.rate(step, self.player.name)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Optimiser moments by parameter position: what a checkpoint must hold."""
        saved = {}
        for i, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                saved[f"{i}/{key}"] = value
        return saved

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave.

        Raises:
            ValueError: when the moments are not of this player's parameters.
        """
        for key, value in saved.items():
            index, _, name = key.partition("/")
            if not index.isdigit() or int(index) >= len(self.parameters):
                raise ValueError(f"The optimiser state of '{self.player.name}' belongs to another recipe.")
            parameter = self.parameters[int(index)]
            if name != "step" and value.shape != parameter.shape:
                raise ValueError(f"The optimiser state of '{self.player.name}' differs in shape.")
            device = "cpu" if name == "step" and parameter.device.type == "cpu" else parameter.device
            self.optimizer.state[parameter][name] = value.to(device).clone()
