"""One file per method; each reads like its paper."""

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import HeadSpec, Loss, Method, Player, Progress, RoleSpec, Sampling

__all__ = ["Batch", "HeadSpec", "Loss", "Method", "Player", "Progress", "Rng", "RoleSpec", "Sampling"]
