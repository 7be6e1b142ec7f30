"""What a step copies between the host and its device, counted on the meta device, which has no values to wait for.

Meta tensors stand in for a GPU's: whatever reads one, or copies to or from the host, is an operator call that a
dispatch mode sees with its arguments. Copies are blocking unless they say ``non_blocking``.
"""

import sys
from collections import Counter

import pytest
import torch
from killable import VP, Teacher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.sources import CaptionDropout, LatentSource, WithPrompts
from fewstep.methods.registry import METHODS
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.helpers import Helpers, PointEncoder, PointReward, one_hot_labels
from fewstep.models.roles import Weights
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles

TOYS = ("models/mlp.py", "models/helpers.py")
"""The toy network forms its coefficients on the host, and the toy encoder stays there."""


class Copies(TorchDispatchMode):
    """Counts copies and reads by kind and by the line that asked."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there, here = (any(t.is_meta == meta for t in tensors) for meta in (True, False))
        to = kwargs.get("device")
        if name == "_local_scalar_dense" and there:
            self.note("read")
            return 1.0
        if name == "_to_copy" and to is not None:
            kind = "copy" if kwargs.get("non_blocking") else "blocking copy"
            if there and torch.device(to).type == "cpu":
                self.note(f"{kind} to the host")
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            if here and torch.device(to).type == "meta":
                self.note(kind)
        elif name == "copy_" and there and here:
            self.note("copy" if len(args) > 2 and args[2] else "blocking copy")
        elif name in ("index", "index_put_", "index_select") and there and here:
            self.note("blocking copy of an index")
        return func(*args, **kwargs)

    def note(self, kind):
        frame, places = sys._getframe(2), []
        while frame is not None:
            _, mine, rest = frame.f_code.co_filename.partition("/src/fewstep/")
            places += [f"{rest}:{frame.f_lineno}"] if mine else []
            frame = frame.f_back
        if not any(place.startswith(TOYS) for place in places[:2]):
            self.seen[kind, places[0] if places else "the test"] += 1


def trainer(name):
    """A trainer of the method on the meta device; its data are on the host."""
    method, settings = METHODS[name](VP), TrainingSettings(steps=6, batch_size=4, accumulation=2, device="meta")
    torch.manual_seed(0)
    network = Teacher(VP, 2, width=16, depth=2, num_classes=3)
    liked = dict.fromkeys((*method.rewards, *method.measures), PointReward())
    helpers = Helpers(encoder=PointEncoder(2), rewards=liked, **one_hot_labels(3))
    for part in (network, *helpers.networks):
        part.to("meta")
    kind = "full" if name in ("ctm", "lightning") else "lora"
    with torch.device("meta"):
        roles = build_roles(Denoiser(network, VP, "epsilon"), method, settings, Weights(kind, rank=2), helpers=helpers)
    generator = torch.Generator().manual_seed(0)
    cond = Cond({"label": torch.arange(10) % 3}, {"label": torch.tensor([-1])})
    data = LatentSource(torch.randn(10, 2, generator=generator), torch.rand(10, 2, generator=generator), cond)
    pairs = PairSource(torch.randn(10, 2, generator=generator), cond, seed=0)
    source = WithPairs(CaptionDropout(WithPrompts(data, ["a"] * 10), 0.3), pairs)
    made = Trainer(method, roles, source, settings)
    for player in made.players:
        player.optimizer.step = lambda: None  # torch's fused kernel knows no meta device
    return made


@pytest.mark.parametrize(
    "name", [name if name in ("lcm", "dmd2") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_step_blocks_on_no_copy_and_reads_nothing(name):
    job = trainer(name)
    with Copies():
        job.step(0)  # copies the null condition once
    with Copies() as copies:
        job.step(1)
    waiting = {key: count for key, count in copies.seen.items() if key[0] != "copy"}
    assert waiting == {}
    rows = sum(count for (kind, place), count in copies.seen.items() if place.startswith("data/sources.py"))
    assert rows == 2 * 3 + 2 * 3 * ("pairs" in METHODS[name].streams or 1)  # mean, std, label; noise, sample, label


def test_the_stand_in_sees_copies_and_reads():
    t = torch.zeros(2, device="meta")
    with Copies() as copies:
        t.to("cpu"), torch.zeros(2).to("meta"), torch.zeros(2).to("meta", non_blocking=True), bool(t[0])
        t.copy_(torch.ones(2))
    assert {kind for kind, _ in copies.seen} == {"blocking copy to the host", "blocking copy", "copy", "read"}
