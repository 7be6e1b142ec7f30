"""Every setting of every method does something: changed alone, it changes draws, losses or the networks of a step.

A setting that is read into an attribute and used nowhere, or is replaced by its default, fails nothing else.
"""

import dataclasses
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from torch import Tensor

from fewstep.methods.registry import METHODS
from tests.methods import test_contract as contract
from tests.mutants.mutant import ROOT

# What a setting is changed to where its kind does not say, and the settings beside which it has its effect.
CT = {"variant": "ct", "num_grid_steps": 40}
HUBER = (0.5, {"loss": "huber"})
ON_THE_ODE = {"rollout": "ode"}  # dmd2
LATE = {"num_inference_steps": 4, "first_exit": 3}  # feedback after three of the student's own calls
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "cm.first_grid_steps": (10, CT),
    "cm.P_mean": (0.5, CT | {"timestep_sampling": "lognormal"}),
    "cm.P_std": (1.0, CT | {"timestep_sampling": "lognormal"}),
    "cm.solver": ("heun", {}),
    "cm.huber_c": HUBER,
    "ctm.solver": ("heun", {}),
    "ctm.huber_c": HUBER,
    "tcd.huber_c": HUBER,
    "pcm.caption_dropout": (0.5, {"guidance_scale": 1.0}),
    "dmd.timestep": (399.0, {}),
    "dmd.huber_c": (0.5, {"regression": "huber"}),
    "dmd.encoder": ("another", {"regression_space": "features"}),
    "dmd2.timesteps": ((800.0, 400.0, 200.0, 100.0), {}),
    "dmd2.student_input": ("noised", {"terminal": "table"}),
    "dmd2.any_steps": (4, {}),
    "dmd2.rollout": ("ode", {"num_inference_steps": 8}),  # enough for an exit after the first time
    "dmd2.match": ("x_s", ON_THE_ODE),
    "dmd2.fake_target": ("score", {"rollout": "ode", "match": "x_s"}),
    "dmd2.first_weight": (0.5, ON_THE_ODE),
    "dmd2.first_solver_steps": ((2, 30), {"rollout": "ode", "first_weight": 0.5}),
    "turbo.encoder": ("another", {}),
    "turbo.augment": (("color",), {}),
    "ladd.num_levels": (5, {"level_weights": (), "warmup_weights": ()}),
    "ladd.level_weights": ((0.0, 0.0, 0.0, 1.0), {"warmup_steps": 0}),
    "ladd.warmup_weights": ((0.0, 0.0, 0.0, 1.0), {}),
    "ladd.warmup_steps": (0, {}),
    "ladd.terminal": ("table", {"warmup_steps": 0}),
    "lightning.num_start_times": (8, {}),
    "lightning.prediction_type": ("sample", {"loss": "unconditional"}),
    "lightning.renoise_times": ((0.02, 0.3, 0.6, 0.8), {"num_inference_steps": 1}),
    "lightning.renoise_weights": ((1.0, 0.0, 0.0, 0.0), {"num_inference_steps": 1}),
    "hyper.segments": (4, {"adversarial_weight": 0.0}),
    "hyper.mse_weight": (0.5, {}),
    "hyper.adversarial_weight": (0.5, {}),
    "hyper.discriminator_weights": ("lora", {"segments": 2}),
    "hyper.halvings": (1, {"segments": 2}),
    "flowmap.velocity": ("data", {"guidance_scale": 1.0}),
    "flowmap.alpha": ((0.4, 0.02), {}),
    "reflow.windows": (4, {}),
    "reflow.solver_steps": (2, {"windows": 4}),
    "reflow.solver": ("heun", {"windows": 4}),
    "reflow.reach": (0.5, {"windows": 4}),
    "reflow.guidance_scale": (3.0, {"windows": 4}),
    "scm.P_mean": (0.2, {"warmup": 0.0}),
    "scm.angle_step": (0.02, {"warmup": 0.0}),
    "scm.warmup": (0.0, {}),
    "scm.any_steps": (1, {"matching_weight": 1.0}),
    "scm.student_every": (2, {"matching_weight": 1.0}),
    "pdd.num_inference_steps": ((8,), {}),
    "pdd.last_layer_rate": (0.5, {}),
    "feedback.rewards": (({"model": "pickscore", "threshold": 5.0},), {}),
    "feedback.held_out": ("another", {}),
    "feedback.sampler": ("lcm", LATE),
    "feedback.num_inference_steps": (8, {"first_exit": 3}),
    "feedback.eta": (0.0, LATE),
    "feedback.num_grid_steps": (40, LATE),
    "feedback.encoder": ("another", {"perceptual_weight": 1.0}),
}
# Settings whose effect lies outside a step, with the reason and where it is seen instead.
ELSEWHERE = {
    # points of a plane are no images, and images alone are augmented
    "turbo.augment": "tests/methods/test_turbo.py::test_both_players_steps_are_the_papers",
}

FIELDS = [
    pytest.param(cls, field, id=f"{name}.{field.name}")
    for name, cls in METHODS.items()
    for field in dataclasses.fields(cls.Settings)
]


def another(kind, value):
    """Another valid value of a setting."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return next(option for option in get_args(kind) if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value if value else 1
    if isinstance(value, float):
        return value / 2 if value else 0.5
    raise AssertionError(f"CASES must say what {value!r} is changed to")


@cache
def before(cls, beside):
    """`seen` without the change; many settings have nothing beside them."""
    return seen(cls, dict(beside))


def seen(cls, settings):
    """All numbers of a step: draws, losses and their parts; the roles and players that the method has and what it asks
    for by name; the shapes of everything that is trained.
    """
    method, roles, _ = contract.build(cls, settings)
    # images that are not their latents
    roles.helpers = dataclasses.replace(roles.helpers, decode=lambda latents: latents / 2)
    found = [(name, tuple(t.shape)) for name, t in sorted(roles.tensors().items())]
    found += [method.players, method.roles(), method.encoder, method.rewards, method.measures]
    draws, losses = contract.step(method, roles, contract.rng_of())
    found += [(name, numbers(value)) for name, value in vars(draws).items()]
    for name, loss in losses.items():
        for term in loss.terms():
            found += [(name, numbers(term.total)), *((k, numbers(v)) for k, v in term.parts.items())]
            found += [(k, numbers(b.term * b.scale)) for k, b in term.balanced.items()]
    return found


def numbers(value):
    return value.detach().double().flatten().tolist() if isinstance(value, Tensor) else value


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_a_setting_changes_a_step(cls, field):
    name = f"{cls.name}.{field.name}"
    value, beside = CASES.get(name, (None, {}))
    if value is None:
        kind = get_type_hints(cls.Settings, include_extras=True)[field.name]
        value = another(kind, getattr(cls.Settings(**beside), field.name))
    changed = seen(cls, {**beside, field.name: value}) != before(cls, tuple(beside.items()))
    assert changed == (name not in ELSEWHERE)


def test_settings_without_effect_on_a_step_are_seen_elsewhere():
    names = {param.id for param in FIELDS}
    assert names >= CASES.keys() and names >= ELSEWHERE.keys()
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
