"""An adaptive integrator of order 8 in float64, for references that must be right to ten digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Dormand and Prince's method of order 8 with error estimates of orders 5 and 3 (Hairer, Nørsett and Wanner 1993,
# Solving Ordinary Differential Equations I, sec. II.10, program DOP853). Stage i: its node, {j: a_ij}.
STAGES: tuple[tuple[float, dict[int, float]], ...] = (
    (0.0, {}),
    (0.05260015195876773, {0: 0.05260015195876773}),
    (0.0789002279381516, {0: 0.0197250569845379, 1: 0.0591751709536137}),
    (0.1183503419072274, {0: 0.02958758547680685, 2: 0.08876275643042054}),
    (0.2816496580927726, {0: 0.2413651341592667, 2: -0.8845494793282861, 3: 0.924834003261792}),
    (1 / 3, {0: 1 / 27, 3: 0.17082860872947386, 4: 0.12546768756682242}),
    (0.25, {0: 0.037109375, 3: 0.17025221101954405, 4: 0.06021653898045596, 5: -0.017578125}),
    (
        4 / 13,
        {
            0: 0.03709200011850479,
            3: 0.17038392571223998,
            4: 0.10726203044637328,
            5: -0.015319437748624402,
            6: 0.008273789163814023,
        },
    ),
    (
        0.6512820512820513,
        {
            0: 0.6241109587160757,
            3: -3.3608926294469414,
            4: -0.868219346841726,
            5: 27.59209969944671,
            6: 20.154067550477894,
            7: -43.48988418106996,
        },
    ),
    (
        0.6,
        {
            0: 0.47766253643826434,
            3: -2.4881146199716677,
            4: -0.590290826836843,
            5: 21.230051448181193,
            6: 15.279233632882423,
            7: -33.28821096898486,
            8: -0.020331201708508627,
        },
    ),
    (
        6 / 7,
        {
            0: -0.9371424300859873,
            3: 5.186372428844064,
            4: 1.0914373489967295,
            5: -8.149787010746927,
            6: -18.52006565999696,
            7: 22.739487099350505,
            8: 2.4936055526796523,
            9: -3.0467644718982196,
        },
    ),
    (
        1.0,
        {
            0: 2.273310147516538,
            3: -10.53449546673725,
            4: -2.0008720582248625,
            5: -17.9589318631188,
            6: 27.94888452941996,
            7: -2.8589982771350235,
            8: -8.87285693353063,
            9: 12.360567175794303,
            10: 0.6433927460157636,
        },
    ),
)
SOLUTION = {
    0: 0.054293734116568765,
    5: 4.450312892752409,
    6: 1.8915178993145003,
    7: -5.801203960010585,
    8: 0.3111643669578199,
    9: -0.1521609496625161,
    10: 0.20136540080403034,
    11: 0.04471061572777259,
}
ERROR_3 = SOLUTION | {0: -0.18980075407240762, 8: -0.4226823213237919, 11: 0.02265179219836082}
ERROR_5 = {
    0: 0.01312004499419488,
    5: -1.2251564463762044,
    6: -0.4957589496572502,
    7: 1.6643771824549864,
    8: -0.35032884874997366,
    9: 0.3341791187130175,
    10: 0.08192320648511571,
    11: -0.022355307863886294,
}


def integrate(
    field: Callable[[Tensor, float], Tensor], y: Tensor, start: float, stop: float, tolerance: float = 1e-11
) -> Tensor:
    """y(stop) of dy/dt = field(y, t) with y(start) = ``y`` (any shape, float64); either direction.

    One step size for the whole batch: the worst element's error per step stays below
    tolerance (1 + abs(y)). Nothing is recorded for autograd.

    Raises:
        ValueError: when the step size shrinks to nothing (a state or field that is not finite).
    """
    span = stop - start
    if span == 0:
        return y
    with torch.no_grad():
        t, h = start, span / 50
        slope = field(y, t)
        while t != stop:
            if abs(h) >= abs(stop - t) * (1 - 1e-12):
                h = stop - t
            slopes = [slope]
            for node, row in STAGES[1:]:
                slopes.append(field(y + h * _mix(row, slopes), t + node * h))
            after = y + h * _mix(SOLUTION, slopes)
            error = _error(slopes, h, tolerance * (1 + torch.maximum(y.abs(), after.abs())))
            if error <= 1:
                t = stop if h == stop - t else t + h
                y, slope = after, field(after, t)
            factor = 0.9 * error ** (-1 / 8) if error > 0 else 6.0
            h *= min(max(factor, 0.2), 6.0) if error == error else 0.2
            if abs(h) < 1e-14 * abs(span):
                raise ValueError("The integration cannot proceed: the state or its velocity is not finite.")
    return y


def _mix(row: dict[int, float], slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for j, weight in row.items():
        total.add_(slopes[j], alpha=weight)
    return total


def _error(slopes: list[Tensor], h: float, scale: Tensor) -> float:
    """Hairer's blend of both estimates, the worst element in units of its tolerance."""
    fifth, third = (_mix(row, slopes) / scale for row in (ERROR_5, ERROR_3))
    blend = fifth.square() / (fifth.square() + 0.01 * third.square()).sqrt().clamp(min=1e-300)
    return abs(h) * float(blend.max()) if blend.numel() else 0.0
