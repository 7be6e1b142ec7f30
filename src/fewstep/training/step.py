"""One training step up to its updates, written once.

The trainer, the memory estimate (`fewstep.planning.memory_trace`), the contract of every method (`fewstep verify`) and
`fewstep doctor` all compute a step by these functions, so what is estimated and verified is what trains::

    batch = source.batch(rng)
    draws = method.draw(batch, rng, progress)                         # all random numbers, before any computation
    for player, loss in losses(method, roles, batch, draws, due):
        learn(loss, backward)                                         # gradients of this player's weights alone
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from fewstep.data.batch import Batch
from fewstep.methods.base import Loss, Method, Player
from fewstep.models.roles import Roles


def losses(
    method: Method, roles: Roles, batch: Batch, draws: Any, due: Collection[str]
) -> Iterator[tuple[Player, Loss]]:
    """The loss of every player in ``due`` on one micro-batch, in the order of `Method.players`.

    Each loss is computed only when the loop comes to it: a caller that goes backward in between holds the graph of one
    player at a time, beside that of `Method.prepare`, which all of them share.
    """
    shared = method.prepare(roles, batch, draws, due)
    for player in method.players:
        if player.name in due:
            yield player, getattr(method, player.name)(roles, batch, draws, shared)


def learn(loss: Loss, backward: Callable[[Loss], object]) -> Loss:
    """``backward`` of a loss and of those that follow it (`Loss.then`), one graph at a time.

    Args:
        backward: adds the gradients of a loss's ``total`` and of its ``balanced`` terms to the player's.

    Returns:
        their sum and all their parts and statistics, without a graph.
    """
    done = Loss(torch.zeros_like(loss.total.detach()))
    for term in loss.terms():
        backward(term)
        done.total += term.total.detach()
        done.parts |= term.parts
        done.stats |= term.stats
    return done


def trained_by(player: Player, roles: Roles) -> list[nn.Parameter]:
    """The parameters that a player updates, role by role in a fixed order."""
    return [p for role in player.roles for p in roles.parameters(role)]
