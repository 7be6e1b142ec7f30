"""One file per method; each reads like its paper. The names of the contract can be imported from here."""

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Balanced, HeadSpec, Loss, Method, Player, Progress, RoleSpec, Sampling

__all__ = ["Balanced", "Batch", "HeadSpec", "Loss", "Method", "Player", "Progress", "Rng", "RoleSpec", "Sampling"]
