"""A user's own method in one file: ``fewstep verify tests/verification/mine.py:Mine``."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from fewstep.methods.base import Loss, Method


class Mine(Method):
    """Knowledge distillation: one step from pure noise learns the end of the teacher's DDIM trajectory."""

    name = "mine"
    sampler = "ddim"

    @dataclass(frozen=True)
    class Settings:
        """Settings of Mine."""

        teacher_steps: int = 16

    def draw(self, batch, rng, progress):
        return rng.sample.normal("noise", batch.x0.shape[1:])

    def prepare(self, roles, batch, draws, due):
        grid = self.schedule.training_grid(self.settings.teacher_steps)[::-1].copy()
        x = draws
        with torch.no_grad():
            for t, s in pairwise(grid):
                x = roles.teacher(x, t, batch.cond).at(s)
        return x

    def student(self, roles, batch, draws, shared):
        x0 = roles.student(draws, self.schedule.start, batch.cond).x0
        return Loss((x0 - shared).square().mean())

    def calls_per_step(self):
        return {"student": 1, "teacher": self.settings.teacher_steps}


class Broken(Mine):
    """Says that it calls its teacher once."""

    def calls_per_step(self):
        return {"student": 1, "teacher": 1}
