"""All random numbers of one training step, whoever draws them, are independent: of each other, and of other steps,
seeds and rows. Drawn twice under one name they would be equal, which changes what a method learns and fails nowhere.
"""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data import pairs, random, sources
from fewstep.data.pairs import PairSource, WithPairs
from fewstep.data.random import Rng
from fewstep.data.sources import Buckets, CaptionDropout, LatentSource, MixtureSource
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.base import Progress
from fewstep.models.cond import Cond
from tests.methods.test_contract import VARIANTS

SOURCE = Path(__file__).parent.parent.parent / "src" / "fewstep"
VP = Schedule.scaled_linear()
ROWS, SHAPE = 768, (8,)
LABELS = Cond({"label": torch.arange(64) % 3}, null={"label": torch.tensor([-1])})
NORMALS = 6 / (ROWS * SHAPE[0]) ** 0.5  # six standard deviations of the correlation of independent numbers
SCALARS = 6 / ROWS**0.5
CASES = [param for param in VARIANTS if param.values[0].name != "duel"]
NAMES = {
    "cm": "dropout guidance_scale hop noise",
    "lcm": "guidance_scale index noise",
    "ctm": "diagonal diagonal_noise end fake_noise guidance_scale half hops index judged noise real_noise",
    "tcd": "end guidance_scale index noise",
    "pcm": "caption fake_noise guidance_scale height index noise real_noise",
    "dmd": "fake_noise fake_time noise start time",
    "dmd2": "data_noise data_time exit fake_noise fake_time guidance_noise guidance_time inner_time/0 judged_noise "
    "judged_time matching_noise matching_time noise played_noise played_time steps",
    "turbo": "fake_augment/0 level noise real_augment/0 teacher_level teacher_noise",
    "ladd": "fake_noise level noise ratio real_noise",
    "lightning": "level level_noise noise start",
    "hyper": "end guidance_scale index level level_noise noise offset",
    "flowmap": "end guidance_scale kind noise time",
    "pdd": "noise start steps target/0/0",
    "reflow": "height noise window",
    "scm": "exit fake_noise fake_time guidance_scale inner_time/0 matching_noise matching_time noise rollout_noise "
    "steps time",
    "feedback": "exit level level_noise noise",
}
"""The streams of each method, numbers as 0. They address its random numbers: with another name a recipe is another run,
and a begun one cannot be resumed. So fields and functions may get better names, and these stay.
"""
CONTEXTS = ((5, 0), (5, 1), (6, 0))  # (seed, step)


def latents():
    """Latents whose batches are the posterior's noise itself, with captions that are dropped, and pairs."""
    generator = torch.Generator().manual_seed(0)
    made = PairSource(torch.randn(64, *SHAPE, generator=generator), LABELS, seed=5)
    data = LatentSource(torch.zeros(64, *SHAPE), torch.ones(64, *SHAPE), LABELS)
    return WithPairs(CaptionDropout(data, 0.5), made)


class Recorded:
    """Every stream that is asked for while this is in force: {(kind, name): the numbers it gave}."""

    def __init__(self, monkeypatch):
        self.streams = {}
        for owner in (random.SampleRandom, random.SharedRandom):
            for kind in ("normal", "integers", "uniform", "integer", "choice"):
                if hasattr(owner, kind):
                    monkeypatch.setattr(owner, kind, self.watched(owner.__name__, kind, getattr(owner, kind)))

    def watched(self, owner, kind, real):
        def draw(rng, name, *rest):
            found = real(rng, name, *rest)
            assert (owner, name) not in {(o, n) for o, _, n in self.streams}, f"'{name}' is drawn twice in one step"
            self.streams[owner, kind, name] = found
            return found

        return draw


def columns(numbers):
    """The numbers of a stream as vectors of one number for each row and element of a latent, or for each row."""
    flat = numbers.reshape(ROWS, -1).double().numpy()
    if flat.shape[1] % SHAPE[0]:
        return list(flat.T)
    return [part.reshape(-1) for part in np.split(flat, flat.shape[1] // SHAPE[0], axis=1)]


def largest_correlation(vectors):
    """Of ranks, so that two uniform or whole numbers of different ranges are seen to be one stream too."""
    ranks = np.argsort(np.argsort(np.stack(vectors), axis=1), axis=1)
    found = np.abs(np.corrcoef(ranks)) - np.eye(len(vectors))
    return found.max()


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_the_streams_of_a_step_are_independent(cls, settings, monkeypatch):
    """Of the source and of the method together: posterior, dropped captions, pairs, and every field of the draws."""
    method, source, noises, scalars = cls(VP, **settings), latents(), [], []
    for seed, step in CONTEXTS:
        with monkeypatch.context() as patch:
            streams = Recorded(patch).streams
            rng = Rng(seed, step, ROWS)
            batch = source.batch(rng)
            draws = method.draw(batch, rng, Progress(step, 10))
        drawn = {f"{kind} {name}": found for (_, kind, name), found in streams.items() if torch.is_tensor(found)}
        fields = {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)}
        fields = {name: value for name, value in fields.items() if torch.is_tensor(value) and value.ndim > 1}
        assert batch.x0.equal(drawn["normal posterior"])
        alone = [v for name, value in drawn.items() for v in columns(value) if not name.startswith("normal")]
        scalars += [v for v in alone if len(v) == ROWS and v.std() > 0]
        # what the method keeps, which may hold sums of streams, beside what it does not see: posterior and pairs
        noises += [v for value in (batch.x0, batch.pairs.noise, *fields.values()) for v in columns(value)]
    assert largest_correlation([v for v in noises if len(v) == ROWS * SHAPE[0]]) < NORMALS
    assert len(scalars) >= len(CONTEXTS) and largest_correlation(scalars) < SCALARS
    rows = [part for v in noises if len(v) == ROWS * SHAPE[0] for part in np.split(v, 2)]  # as two processes have them
    assert largest_correlation(rows) < 2**0.5 * NORMALS


def test_every_stream_that_stands_in_a_method_is_drawn_above(monkeypatch):
    """A stream that no case draws would be no part of the test above."""
    by_method = {name: set() for name in NAMES}
    for param in CASES:
        cls, settings = param.values
        with monkeypatch.context() as patch:
            streams = Recorded(patch).streams
            rng = Rng(5, 0, ROWS)
            cls(VP, **settings).draw(latents().batch(rng), rng, Progress(0, 10))
        by_method[cls.name] |= {name for _, _, name in streams}
    seen = set().union(*by_method.values())
    of_source = {"posterior", "caption_dropout"}
    kept = {method: {re.sub(r"\d+", "0", name) for name in names} - of_source for method, names in by_method.items()}
    assert kept == {method: set(names.split()) for method, names in NAMES.items()}
    wanted = named(SOURCE / "methods") | named(SOURCE / "data")
    missing = {name for name in wanted if not any(re.fullmatch(name, other) for other in seen)}
    assert len(wanted) > 20 and missing == set()


def named(folder):
    """Patterns of the literal names under which streams are drawn in a folder's files."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if not re.search(r"rng\.(sample|shared)$", ast.unparse(node.func.value)):
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant):
                found.add(re.escape(first.value))
            elif isinstance(first, ast.JoinedStr):
                found.add("".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in first.values))
    return found


def test_no_two_owners_ask_for_one_key(monkeypatch):
    """Epochs, buckets, pairs, mixtures and the streams of a step: a key belongs to one object and one line."""
    asked, real = {}, random.stream_key

    def key(*parts):
        caller = sys._getframe(1)
        owner = caller.f_code.co_qualname, caller.f_lineno, id(caller.f_locals.get("self"))
        asked.setdefault(tuple(map(str, parts)), set()).add(owner)
        return real(*parts)

    for module in (random, sources, pairs):
        monkeypatch.setattr(module, "stream_key", key)
    few = [LatentSource(torch.zeros(n, *SHAPE), torch.ones(n, *SHAPE), None) for n in (5, 9)]
    every = CaptionDropout(Buckets(few), 0.5), latents(), MixtureSource(GaussianMixture.ring(6), None)
    for step in range(30):
        rng = Rng(5, step, 8)
        every[step % 3].batch(rng)
        rng.sample.normal("noise", SHAPE)
        rng.shared.integer("exit", 0, 4)
    kinds = {name for key in asked for name in key if not name.isdigit()}
    assert {"order", "order 0", "order 1", "pairs", "pair", "buckets", "mixture", "sample", "shared"} <= kinds
    assert [key for key, owners in asked.items() if len(owners) > 1] == []
