"""One file per method; each reads like its paper."""

from fewstep.methods.base import Batch, Loss, Method, Player, Progress, RoleSpec
from fewstep.methods.random import Rng

__all__ = ["Batch", "Loss", "Method", "Player", "Progress", "Rng", "RoleSpec"]
