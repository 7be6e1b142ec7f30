"""LADD: where both sides are compared, and that every sample of the student has a gradient from every head."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fewstep.methods.base import Progress
from fewstep.methods.ladd import LADD
from fewstep.verification.bench import Bench
from fewstep.verification.report import Row

_POINTS = 4096


def fixed_rows(bench: Bench, method: LADD) -> list[Row]:
    """The noise levels of the discriminator, and the gradient of every sample from every head."""
    warm = method.settings.warmup_steps
    batch, draws = bench.draw(method, _POINTS, warm, Progress(warm, 10**9))
    level = np.log(method.schedule.noise_to_signal(method.judged_at(draws.ratio)))
    roles = bench.roles(method, torch.float64)
    shared = method.prepare(roles, batch, draws, {"student", "discriminator"})
    logits = roles.heads["discriminator"](shared.fake, shared.condition)
    grads = [torch.autograd.grad(F.softplus(logit).sum(), shared.x0_student, retain_graph=True)[0] for logit in logits]
    share = float(torch.stack([(grad != 0).any(dim=1) for grad in grads]).double().mean())
    return [
        Row("median of log(sigma/alpha) where both sides are compared", method.settings.ratio_mean,
            float(np.median(level)), 0.08),
        Row("share of samples with a gradient from every logit", 1.0, share, 1e-3),
    ]  # fmt: skip
