"""The optimisers of a player: PyTorch's fused AdamW, or bitsandbytes' 8-bit AdamW for less memory.

Both skip a step on the device when ``found_inf`` is 1: weights and moments stay what they were.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.training.settings import TrainingSettings

_SMALL = 4096  # elements; below, bitsandbytes keeps float32 moments
_BLOCK = 256  # elements that share a scale
_CONSTANT = ("qmap1", "qmap2")  # the same table for every parameter


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> Any:
    """AdamW as ``settings.optimizer`` names it.

    Raises:
        ValueError: bitsandbytes is not installed, or has no kernels for this device.
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    check_optimizer(settings, parameters[0].device)
    return _adamw8bit()(parameters, **options)


def check_optimizer(settings: TrainingSettings, device: torch.device | str | None = None) -> None:
    """Try the optimiser on a few numbers; raises ValueError in one sentence when it cannot work here."""
    if settings.optimizer == "adamw":
        return
    try:
        cls = _adamw8bit()
    except ImportError:
        raise ValueError(
            "training.optimizer adamw8bit needs bitsandbytes: install it with pip install 'fewstep[lowmem]', "
            "or take adamw."
        ) from None
    device = torch.device(device or settings.device)
    probe = nn.Parameter(torch.zeros(_SMALL, device=device))
    probe.grad = torch.ones_like(probe)
    optimizer = cls([probe], lr=1.0)
    optimizer.found_inf = torch.zeros((), device=device)
    try:
        optimizer.step()
        works = bool((probe < 0).all())
    except (RuntimeError, NotImplementedError, AttributeError):
        works = False
    if not works:
        raise ValueError(
            f"This bitsandbytes cannot update weights on {device.type} (0.48 and later can on cpu and cuda): "
            "update it with pip install -U bitsandbytes, or take training.optimizer adamw."
        )


@cache
def _adamw8bit() -> type[Any]:
    """bitsandbytes' AdamW8bit with a guard and without a wait for the device after every parameter."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels that fewstep does not use
    from bitsandbytes.optim import AdamW8bit

    class Guarded8bit(AdamW8bit):  # type: ignore[misc]
        found_inf: Tensor

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            skip = self.found_inf > 0
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        self.prepare(group, parameter, group_index, index)
                        self._update(skip, group, parameter, group_index, index)

        def prepare(self, group: Any, parameter: Tensor, group_index: int, index: int) -> None:
            """Moments at zero, where there are none yet."""
            if not self.state[parameter]:
                self.init_state(group, parameter, group_index, index)

        def _update(self, skip: Tensor, group: Any, parameter: Tensor, group_index: int, index: int) -> None:
            assert parameter.grad is not None
            parameter.grad.masked_fill_(skip, 0.0)  # NaN has no place in the 8-bit table
            changing = [parameter.data, *_moments(self.state[parameter]).values()]
            before = [t.clone() for t in changing]  # copies one parameter's state at a time, to save memory
            self.update_step(group, parameter, group_index, index)
            for now, old in zip(changing, before, strict=True):
                now.copy_(torch.where(skip, old, now))

    return Guarded8bit


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in _CONSTANT}


def saved_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """One parameter's optimiser state for a checkpoint; empty before the first step."""
    state = optimizer.state.get(parameter, {})
    found = _moments(state)
    if isinstance(state.get("step"), int):  # the 8-bit optimiser counts on the host
        found["step"] = torch.tensor(float(state["step"]))
    return found


def load_state(optimizer: Any, index: int, saved: dict[str, Tensor]) -> None:
    """Restore what `saved_state` gave of the parameter at ``index``.

    Raises:
        ValueError: when the moments belong to another parameter or another optimiser.
    """
    parameter = optimizer.param_groups[0]["params"][index]
    if hasattr(optimizer, "prepare"):
        optimizer.prepare(optimizer.param_groups[0], parameter, 0, index)
        like = saved_state(optimizer, parameter)
    else:
        like = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.tensor(0.0)}
    if not saved.keys() <= like.keys():
        raise ValueError("is of another optimiser")
    if any(like[name].shape != value.shape for name, value in saved.items()):
        raise ValueError("differs in shape")
    state = optimizer.state[parameter]
    for name, value in saved.items():
        device = value.device if name == "step" and parameter.device.type == "cpu" else parameter.device
        state[name] = int(value) if isinstance(state.get(name), int) else value.to(device).clone()


def moment_bytes(parameters: Sequence[Tensor], optimizer: str) -> int:
    """Bytes of the moments: two per parameter in its own dtype, or one byte each and a scale per 256 elements."""
    total = 0
    for parameter in parameters:
        n = parameter.numel()
        if optimizer == "adamw" or n < _SMALL:
            total += 2 * n * parameter.element_size()
        else:
            total += 2 * n + 2 * 4 * -(-n // _BLOCK)
    return total
