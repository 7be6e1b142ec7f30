"""The contract of every method, checked on one step in float64, without training."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from fewstep.methods.base import Loss, Method
from fewstep.models.roles import Roles
from fewstep.training.players import PlayerState
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import losses, trained_by
from fewstep.training.trainer import follow
from fewstep.verification.bench import Bench
from fewstep.verification.report import Row

_BATCH = 16


def contract_rows(bench: Bench, method: Method, label: str = "") -> list[Row]:
    """Replays, gradients and calls of one step with every player due; ``label`` stands before each quantity."""
    settings = TrainingSettings(ema_decay=0.0, precision="fp64")
    roles = bench.roles(method, settings.dtype)
    follow(roles, method, settings)
    (first, _), (again, _) = _losses(bench, method, roles), _losses(bench, method, roles)
    difference = max(abs(_value(first[name]) - _value(again[name])) for name in first)
    rows = [
        Row("same draws, same loss: difference", 0.0, difference, 0.0),
        *_gradient_rows(bench, method, roles, settings),
        *_call_rows(bench, method, roles),
    ]
    return [dataclasses.replace(row, quantity=label + row.quantity) for row in rows]


def gan_contract_rows(bench: Bench, method: Method) -> list[Row]:
    """The same for a method verified without its discriminator, with the one that ``adversarial_weight`` adds."""
    if method.gan:
        return []
    adversarial = type(method)(method.schedule, dataclasses.replace(method.settings, adversarial_weight=1.0))
    return contract_rows(bench, adversarial, "with a discriminator: ")


def _losses(bench: Bench, method: Method, roles: Roles) -> tuple[dict[str, Loss], Any]:
    """Every player's loss of step 0, and its draws."""
    batch, draws = bench.draw(method, _BATCH)
    everybody = [player.name for player in method.players]
    return {player.name: loss for player, loss in losses(method, roles, batch, draws, everybody)}, draws


def _value(loss: Loss) -> float:
    return sum(term.total.item() for term in loss.terms())


def _gradient_rows(bench: Bench, method: Method, roles: Roles, settings: TrainingSettings) -> list[Row]:
    """Each player's loss must reach the weights that the player trains, and leave a gradient on no others."""
    players = [PlayerState(player, trained_by(player, roles), settings) for player in method.players]
    rows = []
    for player in players:
        loss = _losses(bench, method, roles)[0][player.player.name]
        player.learn(loss, 1)
        own = sum(_reached(p) for p in player.parameters) / len(player.parameters)
        strays = sum(_reached(p) for other in players if other is not player for p in other.parameters)
        rows.append(Row(f"share of the {player.player.name}'s weights its loss reaches", 1.0, own, 0.0))
        rows.append(Row(f"others' weights the {player.player.name}'s loss reaches", 0.0, strays, 0.0))
        for state in players:
            state.optimizer.zero_grad(set_to_none=True)
    return rows


def _reached(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


def _call_rows(bench: Bench, method: Method, roles: Roles) -> list[Row]:
    """Counted network calls against those the method declares; roles that share one view count together."""
    views = roles.views()
    before = {name: view.cost.calls for name, view in views.items()}
    found, draws = _losses(bench, method, roles)
    for loss in found.values():
        _value(loss)
    declared = method.calls(draws)
    shared: dict[int, list[str]] = {}
    for name, view in views.items():
        shared.setdefault(id(view), []).append(name)
    rows = []
    for names in shared.values():
        expected = sum(declared.get(name, 0) for name in names)
        counted = views[names[0]].cost.calls - before[names[0]]
        rows.append(Row(f"network calls per step: {' + '.join(names)}", expected, counted, 0.0))
    return rows
