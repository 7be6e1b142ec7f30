"""Settings of a training run, apart from what is trained and how the method works."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from fewstep.methods.settings import LARGEST, Count, checked
from fewstep.training.distributed import MINUTES

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


@checked
class TrainingSettings:
    """How to optimise.

    Attributes:
        steps: optimiser steps.
        batch_size: global batch, before it is split into micro-batches.
        accumulation: micro-batches per step; must divide batch_size.
        learning_rate: peak rate of AdamW; critic_learning_rate for other players than the student (None: the same,
            or the method's share of it, `Player.rate`).
        warmup_steps: linear warm-up; then constant, or cosine down to 0 at the last step.
        optimizer: "adamw", or "adamw8bit" with moments in a quarter of the memory (extra `lowmem`).
        betas, weight_decay, eps: of AdamW; critic_betas for other players than the student (None: the same).
        max_grad_norm: clip of each player's total gradient norm, over every tensor it trains; 0 is off.
        ema_decay: EMA of the student kept for evaluation and export; 0 is off.
        precision: "fp32", "bf16" (network arithmetic only, master weights stay fp32) or "fp64".
        gradient_checkpointing: recompute activations in backward, for memory.
        compile: compile the networks' repeated blocks (torch.compile): minutes at the first steps, faster ones after.
        offload: keep the frozen weights of repeated blocks in host memory, and on the device those of two blocks at a
            time; each block is checkpointed.
        fsdp: spread the frozen base and full-weight networks over torchrun's processes (FSDP2); LoRAs stay whole.
        log_every, checkpoint_every: in steps; statistics stay on the device in between.
        keep_checkpoints: how many checkpoints to keep.
        async_checkpoints: train on while sharded weights (fsdp) are written, from a copy in host memory.
        trackers: programs that receive every line of the log too. The key stands here, beside log_every, because it
            concerns how a run is monitored, and may change when the run is resumed.
        device: "cpu", "cuda", ...
        timeout_minutes: for how long a process waits for the others in a step before the run ends.

    Raises:
        ValueError: one sentence that names the setting.
    """

    steps: Count = 1000
    batch_size: Count = 16
    accumulation: Count = 1
    learning_rate: Positive = 1e-4
    critic_learning_rate: Positive | None = None
    warmup_steps: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    critic_betas: tuple[Decay, Decay] | None = None
    weight_decay: AtLeast0 = 0.0
    eps: Positive = 1e-8
    max_grad_norm: AtLeast0 = 1.0
    ema_decay: Decay = 0.0
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    offload: bool = False
    fsdp: bool = False
    log_every: Count = 25
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    async_checkpoints: bool = True
    trackers: tuple[Literal["tensorboard", "trackio"], ...] = ()
    device: str = "cpu"
    timeout_minutes: Annotated[float, Field(ge=0.1, le=10_000)] = MINUTES

    @field_validator("precision", mode="before")
    @classmethod
    def _refuse_fp16(cls, value: object) -> object:
        if value == "fp16":
            raise ValueError("training.precision fp16 diverges in distillation: use bf16 or fp32.")
        return value

    def __post_init__(self) -> None:
        """Check what concerns several settings at once; pydantic has checked each alone."""
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training.accumulation ({self.accumulation}) must divide training.batch_size ({self.batch_size})."
            )
        if self.compile and self.fsdp:
            raise ValueError("training.compile does not go with training.fsdp: leave one of them out.")
        for other, is_on in (("compile", self.compile), ("fsdp", self.fsdp)):
            if self.offload and is_on:
                raise ValueError(f"training.offload does not go with training.{other}: leave one of them out.")
        for other, is_on in (("training.precision fp64", self.precision == "fp64"), ("training.fsdp", self.fsdp)):
            if self.optimizer == "adamw8bit" and is_on:
                raise ValueError(f"training.optimizer adamw8bit does not go with {other}: use adamw.")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of data, states and losses."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    def rate(self, step: int, player: str = "student", share: float = 1.0, start: int = 0) -> float:
        """Learning rate of a player at ``step`` (from 0); ``share`` is its `Player.rate`.

        Warm-up and decay are those of the player's own steps, from its ``start`` to the last.
        """
        step, steps = max(0, step - start), max(1, self.steps - start)
        peak = self.learning_rate * share
        if player != "student" and self.critic_learning_rate is not None:
            peak = self.critic_learning_rate
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return peak
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
