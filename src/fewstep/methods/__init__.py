"""One file per method; each reads like its paper."""

from fewstep.methods.base import Batch, HeadSpec, Loss, Method, Player, Progress, RoleSpec, Sampling
from fewstep.methods.random import Rng

__all__ = ["Batch", "HeadSpec", "Loss", "Method", "Player", "Progress", "Rng", "RoleSpec", "Sampling"]
