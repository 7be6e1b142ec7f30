"""Random streams: what they depend on and what they do not."""

import itertools
import subprocess
import sys

import torch

from fewstep.data.random import Rng, stream_key

LITERAL = 730802736880467508


def numbers(seed, step, name):
    """One number of every kind, for 64 rows or shared by them."""
    rng = Rng(seed, step, 64)
    return {
        "normal": rng.sample.normal(name, (2,)),
        "integers": rng.sample.integers(name, 0, 10**6),
        "uniform": rng.sample.uniform(name),
        "shared integer": torch.tensor([rng.shared.integer(name, 0, 10**9)]),
        "shared uniform": torch.tensor([rng.shared.uniform(name)]),
        "shared choices": torch.tensor([Rng(seed, step, 1).shared.choice(f"{name}{i}", [1, 1]) for i in range(64)]),
    }


def test_streams_depend_on_seed_step_and_name():
    keys = list(itertools.product((3, 4), (0, 1, 10), ("noise", "posterior")))
    drawn = {key: numbers(*key) for key in keys}
    for a, b in itertools.combinations(keys, 2):
        for kind, values in drawn[a].items():
            assert not torch.equal(values, drawn[b][kind]), (kind, a, b)
    assert all(torch.equal(v, drawn[keys[0]][kind]) for kind, v in numbers(*keys[0]).items())  # and on nothing else


def test_rows_of_one_step_are_independent():
    drawn = Rng(0, 0, 4096).sample.normal("noise", (2,))
    assert torch.corrcoef(torch.stack([drawn[:-1, 0], drawn[1:, 0], drawn[1:, 1]]))[0, 1:].abs().max() < 0.06


def test_numbers_lie_where_they_should():
    """Bounds included or not as documented, choices in proportion to their weights."""
    rng = Rng(0, 0, 20_000)
    whole, fraction = rng.sample.integers("index", 2, 5), rng.sample.uniform("w", 3.0, 7.0)
    assert whole.dtype == torch.int64 and whole.unique().tolist() == [2, 3, 4]
    assert fraction.dtype == torch.float64 and 3 <= fraction.min() < 3.01 and 6.99 < fraction.max() < 7
    assert Rng(0, 0, 4, dtype=torch.float64).sample.normal("noise", (2, 3)).dtype == torch.float64
    steps = [Rng(0, step, 1).shared for step in range(3000)]
    assert {s.integer("n", 2, 5) for s in steps} == {2, 3, 4}
    assert abs(sum(s.uniform("u", 3.0, 7.0) for s in steps) / 3000 - 5) < 0.1
    chosen = torch.tensor([s.choice("h", [1, 0, 2, 1]) for s in steps])
    assert (torch.bincount(chosen, minlength=4) / 3000 - torch.tensor([0.25, 0, 0.5, 0.25])).abs().max() < 0.04


def test_keys_are_the_same_everywhere():
    """A literal, so that versions agree, and another process, where Python's own hashes differ."""
    assert stream_key(0, 1, "sample", "noise") == LITERAL
    code = "from fewstep.data.random import stream_key; print(stream_key(0, 1, 'sample', 'noise'))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == LITERAL
    assert len({stream_key(*parts) for parts in ((1, 23), (12, 3), (1, 2, 3), (123,))}) == 4
