"""Rewards for tests whose subject is something else."""

from pathlib import Path

import torch

from fewstep.data.files import save_tensors
from fewstep.models.encoders import load_encoder
from fewstep.models.helpers import PointReward
from fewstep.models.rewards import About, RewardNetwork, reward_file


def never_enough(pictures, prompts):
    """A reward whose threshold no picture reaches, so that it pulls at all of them."""
    return PointReward()(pictures, prompts) - 1e3


def taste(path: Path, trunk: str) -> Path:
    """A reward model with a random taste."""
    torch.manual_seed(3)
    network = RewardNetwork(About(trunk, load_encoder().heads))
    if trunk == "encoder":
        network.trunk.load_state_dict(load_encoder().state_dict())
    save_tensors(path, *reward_file(network))
    return path
