"""The small network of verification: it hears everything it declares, at every noise level."""

import pytest
import torch

from fewstep.diffusion.schedule import Schedule
from fewstep.models.cond import Cond
from fewstep.models.mlp import MLP

SCHEDULES = {
    "vp": (Schedule.scaled_linear(), 999, 500),
    "edm": (Schedule.edm(), 80.0, 1.0),
    "flow": (Schedule.flow(), 1.0, 0.5),
}


def answers(network, t, **inputs):
    return network(torch.ones(1, 2), torch.tensor([t]), **inputs).detach()


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_input_is_heard(name):
    schedule, start, middle = SCHEDULES[name]
    torch.manual_seed(0)
    network = MLP(schedule, 2, width=16, depth=2, num_classes=3, accepts=frozenset({"end", "guidance_embed"}))
    said = [answers(network, middle), answers(network, start), answers(network, middle, end=torch.tensor([start]))]
    said += [answers(network, middle, end=torch.tensor([schedule.end]))]
    said += [answers(network, middle, guidance_embed=torch.tensor([w])) for w in (2.0, 3.0)]
    said += [answers(network, middle, cond=Cond({"label": torch.tensor([k])})) for k in (0, 1, 2)]
    for i, a in enumerate(said):
        assert all(not torch.allclose(a, b, atol=1e-5) for b in said[:i])
    nobody = Cond({"label": torch.tensor([-1])})
    assert torch.equal(answers(network, middle, cond=nobody), said[0])


def test_checkpointing_changes_no_gradient():
    schedule, _, middle = SCHEDULES["vp"]
    torch.manual_seed(0)
    network, gradients = MLP(schedule, 2, width=16, depth=2), []
    for network.gradient_checkpointing in (False, True):
        network(torch.ones(3, 2), torch.full((3,), middle)).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
