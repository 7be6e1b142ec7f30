"""Small training runs in a module of their own, so that another process can run them and be killed.

``python killable.py CASE FOLDER`` trains and prints every step it has done.
"""

import sys
import time
from pathlib import Path

import torch

from fewstep.data.sources import MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.lcm import LCM
from fewstep.methods.tcd import TCD
from fewstep.models.denoiser import Denoiser
from fewstep.models.helpers import Helpers, PointEncoder, PointReward, one_hot_labels
from fewstep.models.mlp import MLP
from fewstep.models.roles import Weights
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles

VP = Schedule.scaled_linear()
RING = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)
SOURCE = MixtureSource(RING, range(3))
CASES = {
    "plain": (TCD(VP), dict(checkpoint_every=100)),
    # Killed while it writes, more often than not.
    "everything": (
        LCM(VP, guidance_embed=True, guidance_scale=(2.0, 6.0), target_decay=0.95),
        dict(ema_decay=0.99, accumulation=2, lr_schedule="cosine", warmup_steps=20, checkpoint_every=1),
    ),
}


class Teacher(MLP):
    """An MLP that takes extra inputs as Stable Diffusion's UNet does."""

    extra_width = 2

    def forward(self, x, t, cond=None, *, extra=None, **inputs):
        said = super().forward(x, t, cond, **inputs)
        return said if extra is None else said + extra


def roles_for(method, settings, rank=4, kind="lora"):
    torch.manual_seed(0)
    network = Teacher(VP, 2, width=16, depth=2, num_classes=3)
    liked = dict.fromkeys((*method.rewards, *method.measures), PointReward())
    helpers = Helpers(encoder=PointEncoder(2), rewards=liked, **one_hot_labels(3))
    return build_roles(Denoiser(network, VP, "epsilon"), method, settings, Weights(kind, rank=rank), helpers=helpers)


def trainer(case="plain", folder=None, hooks=(), source=SOURCE, rank=4, seed=0, kind="lora", **changes):
    method, settings = CASES[case] if isinstance(case, str) else (case, {})
    settings = TrainingSettings(**{"steps": 200, "batch_size": 8, "learning_rate": 1e-2} | settings | changes)
    roles = roles_for(method, settings, rank, kind)
    return Trainer(method, roles, source, settings, seed=seed, run_dir=folder, hooks=hooks)


def announce(step):
    print(step, flush=True)
    if step > 110:
        time.sleep(0.01)  # leaves the time to be killed in


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer(sys.argv[1], Path(sys.argv[2]), hooks=((1, announce),)).run()
