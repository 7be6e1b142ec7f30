"""The Denoiser: guidance, counting, dtypes, times, extra inputs; EDM's preconditioning."""

import math

import pytest
import torch
from torch import nn

from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.prediction import PREDICTION_TYPES
from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Cost, Denoiser, edm_precondition
from fewstep.models.roles import Roles, Weights

VP, EDM, FLOW = Schedule.scaled_linear(), Schedule.edm(), Schedule.flow()
RING = GaussianMixture.ring(6, 1.0, 0.3, num_classes=3)


class Recorder:
    """A network that remembers what it was asked and answers with what depends on all of it."""

    def __init__(self, accepts=(), dtype=None):
        self.asked, self.accepts = [], frozenset(accepts)
        if dtype is not None:
            self.dtype = dtype

    def __call__(self, x, t, cond=None, **extras):
        self.asked.append((x, t, cond, extras))
        out = x * (1 + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000)
        for value in [*(cond.tensors.values() if cond is not None else ()), *extras.values()]:
            out = out + value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return out


def labels(n=8):
    return Cond({"label": torch.arange(n) % 3}, null={"label": torch.tensor([-1])})


def states(n=8, dtype=torch.float64):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------ guidance


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=lambda s: s.family)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("scale", [0.0, 1.5, 7.5, "rows"])
def test_guidance_in_one_batch_in_two_calls_and_by_formula(schedule, kind, scale):
    if kind == "epsilon" and schedule is FLOW:
        pytest.skip("refused: see below")
    network, x, t = RING.network(schedule, kind), states(), 0.6 * schedule.start
    w = torch.linspace(0, 6, 8, dtype=torch.float64) if scale == "rows" else scale
    one = Denoiser(network, schedule, kind)(x, t, labels(), w)
    two = Denoiser(network, schedule, kind, batched_guidance=False)(x, t, labels(), w)
    torch.testing.assert_close(one.output, two.output, rtol=1e-12, atol=1e-12)
    null, cond = network(x, t, {"label": torch.full((8,), -1)}), network(x, t, labels())
    rows = w[:, None] if scale == "rows" else w
    torch.testing.assert_close(one.output, null + rows * (cond - null), rtol=1e-12, atol=1e-12)
    # guided x0 is the same whatever the network predicts
    x0 = [RING.x0(x, *schedule.alpha_sigma(t), label) for label in (None, labels()["label"])]
    torch.testing.assert_close(one.x0, x0[0] + rows * (x0[1] - x0[0]), rtol=1e-9, atol=1e-9)


def test_guidance_of_one_asks_once_and_zero_is_unconditional():
    denoiser = Denoiser(RING.network(VP), VP)
    alone = denoiser(states(), 500, labels())
    assert denoiser.cost == Cost(1, 8, 0)
    torch.testing.assert_close(denoiser(states(), 500, labels(), torch.ones(8)).output, alone.output)
    torch.testing.assert_close(denoiser(states(), 500, labels(), 0.0).output, denoiser(states(), 500).output)


def test_null_comes_first_and_extras_reach_both_branches():
    network = Recorder({"end", "guidance_embed"})
    Denoiser(network, VP)(states(2), 500, labels(2), 3.0, end=20, guidance_embed=torch.tensor([2.0, 5.0]))
    x, t, cond, extras = network.asked[0]
    assert torch.equal(x, torch.cat([states(2)] * 2)) and t.tolist() == [500] * 4
    assert cond["label"].tolist() == [-1, -1, 0, 1]
    assert extras["end"].tolist() == [20] * 4 and extras["guidance_embed"].tolist() == [2, 5, 2, 5]


def test_guidance_needs_a_condition_and_its_null():
    with pytest.raises(ValueError, match="Guidance needs a condition"):
        Denoiser(RING.network(VP), VP)(states(), 500, None, 2.0)
    with pytest.raises(ValueError, match="no null counterpart"):
        Denoiser(RING.network(VP), VP)(states(), 500, Cond({"label": torch.zeros(8).long()}), 2.0)


# ------------------------------------------------------------------ cost


def test_cost_counts_calls_images_and_graphs():
    layer = nn.Linear(2, 2).double()
    for batched, calls in ((True, 1), (False, 2)):
        denoiser = Denoiser(lambda x, t, cond=None: layer(x), VP, batched_guidance=batched)
        denoiser(states(), 500)
        assert denoiser.cost == Cost(1, 8, 8) and denoiser.cost.forward_equivalents == 24
        with torch.no_grad():
            denoiser(states(), 500, labels(), 3.0)
        assert denoiser.cost == Cost(1 + calls, 24, 8) and denoiser.cost.forward_equivalents == 40


# ------------------------------------------------------------------ dtypes and times


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks(dtype):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t, cond=None):
            assert x.dtype == dtype
            return self.layer(x)

    network = Net().to(dtype)
    said = Denoiser(network, VP)(states(dtype=torch.float32), 999)
    assert said.output.dtype == said.x0.dtype == torch.float32
    expected = network.layer(states(dtype=torch.float32).to(dtype)).float()
    assert torch.equal(said.output, expected)  # promoted first: x0 is then formed in float32
    a, s = float(VP.alpha(999)), float(VP.sigma(999))
    torch.testing.assert_close(said.x0, (states(dtype=torch.float32) - s * expected) / a, rtol=1e-5, atol=1e-5)
    assert Denoiser(network, VP)(states(), 999).x0.dtype == torch.float64
    # guided: combined after the promotion
    guided = Denoiser(Recorder(dtype=dtype), VP)(states(dtype=torch.float32), 0, labels(), 7.5).output
    low = states(dtype=torch.float32).to(dtype)
    null, cond = (low - 1).float(), (low + labels()["label"][:, None].to(dtype)).float()
    torch.testing.assert_close(guided, null + 7.5 * (cond - null), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "t", "dtype"),
    [
        (VP, 999, torch.int64),
        (VP, 999.0, torch.int64),
        (VP, torch.tensor([3.0, 4.0]), torch.int64),
        (VP, torch.tensor([3, 4]), torch.int64),
        (VP, 3.5, torch.float32),
        (FLOW, 1.0, torch.float32),
        (EDM, torch.tensor([1, 80]), torch.float32),
    ],
)
def test_times_a_network_sees(schedule, t, dtype):
    network = Recorder()
    Denoiser(network, schedule, "sample")(states(2, torch.float32), t)
    seen = network.asked[0][1]
    assert seen.shape == (2,) and seen.dtype == dtype
    assert torch.equal(seen.double(), torch.as_tensor(t).double().expand(2))


# ------------------------------------------------------------------ refusals


def test_extra_inputs_must_be_declared():
    with pytest.raises(ValueError, match=r"no input 'end': it declares no extra inputs"):
        Denoiser(RING.network(VP), VP)(states(), 500, end=0)
    with pytest.raises(ValueError, match=r"no input 'guidance_embed': it declares \['end'\]"):
        Denoiser(Recorder({"end"}), VP)(states(), 500, guidance_embed=3.0)


def test_epsilon_from_pure_noise_is_refused():
    for schedule in (FLOW, VP.zero_terminal_snr()):
        with pytest.raises(ValueError, match="An epsilon network cannot start from pure noise"):
            Denoiser(RING.network(schedule), schedule)
        assert Denoiser(RING.network(schedule, "v_prediction"), schedule, "v_prediction")(states(), schedule.start)


def test_other_refusals():
    with pytest.raises(ValueError, match="Unknown prediction_type 'eps'"):
        Denoiser(RING.network(VP), VP, "eps")
    with pytest.raises(ValueError, match="offers no features"):
        Denoiser(lambda x, t, cond: x, VP).features(states(), 1, None, ("mid",))


# ------------------------------------------------------------------ EDM


def edm_by_hand(raw, x, sigma, d):
    root = math.sqrt(sigma**2 + d**2)
    return d**2 / root**2 * x + sigma * d / root * raw(x / root, math.log(sigma) / 4)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 80.0])
@pytest.mark.parametrize("d", [0.5, 1.3])
def test_edm_preconditioning_is_the_papers(sigma, d):
    network = edm_precondition(lambda x, noise, cond: torch.sin(3 * x) + noise[:, None], d)
    said = Denoiser(network, EDM, "sample")(states(), sigma).x0
    expected = edm_by_hand(lambda x, noise: torch.sin(3 * x) + noise, states(), sigma, d)
    torch.testing.assert_close(said, expected, rtol=1e-13, atol=1e-13)


def test_edm_preconditioning_per_sample_and_at_clean_data():
    network = edm_precondition(lambda x, noise, cond, end=None: torch.sin(x) + noise[:, None])
    t = torch.tensor([0.01, 2.0, 80.0, 0.5, 1.0, 1.0, 3.0, 40.0], dtype=torch.float64)
    each = torch.cat([network(states()[i : i + 1], t[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(network(states(), t), each, rtol=1e-14, atol=1e-14)
    assert torch.equal(network(states(), torch.zeros(8)), states())
    assert Denoiser(edm_precondition(Recorder({"end"})), EDM, "sample").accepts == {"end"}


def test_edm_preconditioning_keeps_the_states_digits():
    """A half-precision network sees rounded input, but c_skip x (all of D at small sigma) is not rounded."""
    raw = Recorder(dtype=torch.bfloat16)
    x = states(dtype=torch.float32)
    said = Denoiser(edm_precondition(raw), EDM, "sample")(x, 0.002).x0
    assert raw.asked[0][0].dtype == torch.bfloat16 and raw.asked[0][1].dtype == torch.float32
    assert said.dtype == torch.float32 and float((said - x).abs().max()) < 0.01
    skip = 0.25 / (0.25 + 0.002**2)
    out = 0.002 * 0.5 / math.sqrt(0.25 + 0.002**2)
    answered = (said - skip * x) / out
    assert float((answered - answered.to(torch.bfloat16).float()).abs().max()) < 2e-3  # what remains is bf16's own
    half = Denoiser(edm_precondition(raw), EDM, "sample")(x.half(), 0.002).x0  # nor is it formed in half precision
    assert half.dtype == torch.float32 and bool((half != half.half().float()).any())


def test_an_edm_network_can_be_a_role():
    class Raw(torch.nn.Module):
        lora_targets = ("layer",)

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x, noise, cond):
            return self.layer(x)

    teacher = Denoiser(edm_precondition(Raw().double()), EDM, "sample")
    x = torch.randn(3, 2, dtype=torch.float64)
    before = teacher(x, 0.7).x0
    roles = Roles(teacher)
    assert torch.equal(roles.add("copy", Weights("full"))(x, 0.7).x0, before)
    assert torch.equal(roles.add("student", Weights("lora", rank=1))(x, 0.7).x0, before)
    assert len(roles.parameters("student")) == 2
