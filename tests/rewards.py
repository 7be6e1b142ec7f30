"""A reward for tests whose subject is something else."""

from fewstep.models.helpers import PointReward


def never_enough(pictures, prompts):
    """A reward whose threshold no picture reaches, so that it pulls at all of them."""
    return PointReward()(pictures, prompts) - 1e3
