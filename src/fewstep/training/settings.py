"""Settings of a training run, apart from what is trained and how the method works."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.training.trackers import PACKAGES


@dataclass(frozen=True)
class TrainingSettings:
    """How to optimise.

    Attributes:
        steps: optimiser steps.
        batch_size: global batch, before it is split into micro-batches.
        accumulation: micro-batches per step; must divide batch_size.
        learning_rate: peak rate of AdamW; critic_learning_rate for other players than the student (None: the same).
        warmup_steps: linear warm-up; then constant, or cosine down to 0 at the last step.
        optimizer: "adamw", or "adamw8bit" with moments in a quarter of the memory (extra `lowmem`).
        betas, weight_decay, eps: of AdamW; critic_betas for other players than the student (None: the same).
        max_grad_norm: clip of each player's total gradient norm, over every tensor it trains; 0 is off.
        ema_decay: EMA of the student kept for evaluation and export; 0 is off.
        precision: "fp32", "bf16" (network arithmetic only, master weights stay fp32) or "fp64".
        gradient_checkpointing: recompute activations in backward, for memory.
        fsdp: spread the frozen base and full-weight networks over torchrun's processes (FSDP2); LoRAs stay whole.
        log_every, checkpoint_every: in steps; statistics stay on the device in between.
        keep_checkpoints: how many checkpoints to keep.
        trackers: programs that get every line of the log too, "tensorboard" and "trackio". They stand here, beside
            log_every, because they say how a run is watched, and may change when it is resumed.
        device: "cpu", "cuda", ...
    """

    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-4
    critic_learning_rate: float | None = None
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    critic_betas: tuple[float, float] | None = None
    weight_decay: float = 0.0
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    log_every: int = 25
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, not {getattr(self, name)}.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training.accumulation ({self.accumulation}) must divide training.batch_size ({self.batch_size})."
            )
        for name in ("learning_rate", "critic_learning_rate", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"training.{name} must be positive and finite, not {value}.")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"training.{name} must be at least 0 and finite, not {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"training.ema_decay must be in [0, 1), not {self.ema_decay}.")
        for name in ("betas", "critic_betas"):
            betas = getattr(self, name)
            if betas is not None and not all(0 <= beta < 1 for beta in betas):
                raise ValueError(f"training.{name} must be two numbers in [0, 1), not {list(betas)}.")
        if self.precision == "fp16":
            raise ValueError("training.precision fp16 diverges in distillation: use bf16 or fp32.")
        if self.precision not in ("fp32", "bf16", "fp64"):
            raise ValueError(f"Unknown training.precision '{self.precision}': use fp32, bf16 or fp64.")
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"Unknown training.optimizer '{self.optimizer}': use adamw or adamw8bit.")
        if self.optimizer == "adamw8bit" and self.precision == "fp64":
            raise ValueError("training.optimizer adamw8bit does not go with training.precision fp64: use adamw.")
        if self.optimizer == "adamw8bit" and self.fsdp:
            raise ValueError("training.optimizer adamw8bit does not go with training.fsdp: use adamw.")
        for name in self.trackers:
            if name not in PACKAGES:
                raise ValueError(f"Unknown tracker '{name}' in training.trackers: use {' or '.join(PACKAGES)}.")
        if self.lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"Unknown training.lr_schedule '{self.lr_schedule}': use constant or cosine.")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of data, states and losses."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    def rate(self, step: int, player: str = "student") -> float:
        """Learning rate of a player at ``step`` (from 0)."""
        peak = self.learning_rate
        if player != "student" and self.critic_learning_rate is not None:
            peak = self.critic_learning_rate
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
