"""Normals by row: Philox's published vectors, an implementation apart, whole batches and parts of them, statistics."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.data import philox as module
from fewstep.data import random
from fewstep.data.pairs import noise_of
from fewstep.data.philox import philox, unit_normals
from fewstep.data.random import Rng, stream_key
from fewstep.scenes64.random import ScenesRng

# "philox 4x32 10" of Random123's kat_vectors: counter, key (low word first), words
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_words_are_the_published_ones(counter, key, expected):
    low, high = words_of(key)
    even, odd = philox(*torch.tensor(words_of(counter)), low | high << 32)
    assert torch.stack([even, odd], dim=1).flatten().tolist() == words_of(expected)


def independent(seed, step, name, row, size):
    """Normals of one row in Python's own numbers: Philox in the paper's words, Box and Muller in float64."""
    key, blocks, found = stream_key(seed, step, "sample", name), -(-size // 4), [[], [], [], []]
    for block in range(blocks):
        left, right, keys = [block, 0], [row, 0], [key % 2**32, key // 2**32]
        for _ in range(10):
            products = 0xD2511F53 * left[0], 0xCD9E8D57 * left[1]
            left = [products[1] // 2**32 ^ right[0] ^ keys[0], products[0] // 2**32 ^ right[1] ^ keys[1]]
            right = [products[1] % 2**32, products[0] % 2**32]
            keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
        for i in range(2):
            radius = math.sqrt(-2 * math.log((left[i] + 0.5) / 2**32))
            found[2 * i].append(radius * math.cos(2 * math.pi * right[i] / 2**32))
            found[2 * i + 1].append(radius * math.sin(2 * math.pi * right[i] / 2**32))
    return torch.tensor(list(itertools.chain(*found)), dtype=torch.float64)[:size]


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 2, 2)])
def test_normals_are_those_of_an_implementation_apart(shape, dtype, apart):
    size = math.prod(shape)
    for seed, step, name, row in ((0, 0, "noise", 0), (7, 10**6, "posterior", 2**31 + 5)):
        drawn = Rng(seed, step, 2**32, slice(row, row + 2), dtype=dtype).sample.normal(name, shape)
        expected = torch.stack([independent(seed, step, name, row + i, size) for i in range(2)]).view(2, *shape)
        assert drawn.dtype == dtype and drawn.shape == (2, *shape)
        torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=apart)


def test_a_literal():
    """So that versions agree: with other numbers, `Rng.version` must change."""
    drawn = Rng(3, 14, 8, slice(6, 7), dtype=torch.float64).sample.normal("noise", (4,))[0]
    expected = torch.tensor(LITERAL, dtype=torch.float64)
    torch.testing.assert_close(drawn, expected, rtol=1e-12, atol=1e-12)
    assert (Rng.version, ScenesRng.version) == (2, 1)


LITERAL = [-1.0860589346015679, -0.33538534165337236, 0.7546305018385396, 0.6887056499300793]


@pytest.mark.parametrize("shape", [(), (2,), (7, 11), (3, 5, 67)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_has_the_same_bits_alone_and_in_any_part_of_the_batch(shape, dtype, monkeypatch):
    """Processes and micro-batches of every size, and a draw in several passes."""
    whole = Rng(1, 2, 24, dtype=dtype).sample.normal("noise", shape)
    for parts in (1, 2, 4, 8, 24):
        size = 24 // parts
        rngs = [Rng(1, 2, 24, slice(i, i + size), dtype=dtype) for i in range(0, 24, size)]
        assert torch.equal(torch.cat([rng.sample.normal("noise", shape) for rng in rngs]), whole)
    assert torch.equal(Rng(1, 2, 4096, slice(5, 11), dtype=dtype).sample.normal("noise", shape), whole[5:11])
    monkeypatch.setattr(module, "_ON_HOST", 24 * 5)
    assert torch.equal(Rng(1, 2, 24, dtype=dtype).sample.normal("noise", shape), whole)


class Calls(TorchDispatchMode):
    """Counts operator calls, and their elements; notes the devices of what they return."""

    def __init__(self):
        super().__init__()
        self.count, self.elements, self.devices = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.count += 1
        for tensor in found if isinstance(found, list) else [found]:
            self.elements += tensor.numel()
            self.devices.add(tensor.device.type)
        return found


def calls(device, rows, size):
    with Calls() as found:
        unit_normals(1, range(5, 5 + rows), size, torch.device(device), torch.float32)
    return found


def test_a_draw_is_made_where_it_is_used_in_as_many_calls_for_any_rows():
    """On a device nothing is copied there, and large draws come in passes that bound the memory."""
    few, many = calls("meta", 2, 65536), calls("meta", 64, 65536)
    assert few.devices == many.devices == {"meta"} and few.count == many.count <= 130
    assert calls("meta", 256, 65536).count > many.count


def test_what_a_draw_costs_does_not_depend_on_the_global_batch():
    def cost(batch_size):
        with Calls() as found:
            Rng(0, 0, batch_size, slice(2, 4)).sample.normal("noise", (4, 8, 8))
        return found.count, found.elements

    assert cost(8) == cost(4096) == cost(2**31)


def test_normals_are_made_on_the_device_of_the_step(monkeypatch):
    asked = []

    def made(key, rows, size, device, dtype):
        asked.append((rows, size, device, dtype))
        return torch.empty(len(rows), size)

    monkeypatch.setattr(random, "unit_normals", made)
    Rng(0, 0, 8, slice(2, 4), "cuda:1", torch.float64).sample.normal("noise", (3, 5))
    assert asked == [(range(2, 4), 15, torch.device("cuda:1"), torch.float64)]


def test_no_numbers_are_made_where_tensors_have_none():
    with Calls() as found:
        drawn = Rng(0, 0, 8, slice(2, 4), "meta", torch.float64).sample.normal("noise", (3, 5))
    assert drawn.shape == (2, 3, 5) and drawn.is_meta and drawn.dtype == torch.float64 and found.count == 1


# ------------------------------------------------------------------ distribution


def largest_gap(drawn):
    """The largest distance of the empirical distribution function from the normal one (Kolmogorov and Smirnov)."""
    sorted_ = drawn.double().flatten().sort().values
    n = len(sorted_)
    normal = torch.special.ndtr(sorted_)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(normal - steps[:-1], steps[1:] - normal).max())


SMALL = 2.7  # times 1/sqrt(n): a gap that normal numbers exceed once in a million times


@pytest.mark.parametrize(("rows", "size"), [(1, 400_000), (100_000, 1), (20_000, 4), (512, 2), (48, 1023)])
def test_they_are_normal(rows, size):
    drawn = Rng(11, 5, rows).sample.normal("noise", (size,))
    n = drawn.numel()
    assert largest_gap(drawn) < SMALL / n**0.5
    x = drawn.double()
    # mean, variance, skewness, kurtosis, sixth moment: six standard deviations of each
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((x**power).mean()) - expected) < 6 * (variance / n) ** 0.5, power
    for limit in (3, 4):
        often = n * math.erfc(limit / 2**0.5)
        assert abs(int((x.abs() > limit).sum()) - often) < 6 * often**0.5 + 1
    assert x.abs().max() < 6.7


def test_all_places_of_a_row_are_normal():
    """Sine and cosine of both pairs of words, over steps."""
    drawn = torch.cat([Rng(2, step, 500).sample.normal("noise", (7,)) for step in range(40)])
    for column in drawn.T:
        assert largest_gap(column) < SMALL / len(column) ** 0.5


def test_the_tests_above_see_what_is_not_normal():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(100_000, generator=generator)
    wrong = [1.04 * normal, normal + 0.03, normal.abs(), 12**0.5 * (torch.rand(100_000, generator=generator) - 0.5)]
    assert largest_gap(normal) < SMALL / 100_000**0.5 < min(largest_gap(x) for x in wrong)


# ------------------------------------------------------------------ independence


def correlations(streams):
    """The largest correlation of two of the streams [n, numbers], and of two of their squares."""
    found = []
    for x in (streams, streams**2, streams.abs().log()):
        matrix = np.corrcoef(x.double().numpy())
        found.append(np.abs(matrix - np.eye(len(matrix))).max())
    return max(found)


def test_rows_names_steps_and_seeds_are_independent():
    """Neighbours above all: keys and counters that differ by one."""
    drawn = [
        Rng(seed, step, 2**32, slice(row, row + 4)).sample.normal(name, (20_000,))
        for seed, step, row, name in itertools.product((0, 1), (0, 1, 2), (0, 2**31 - 4), ("noise", "noise2"))
    ]
    assert correlations(torch.cat(drawn)) < 7 / 20_000**0.5


def test_the_numbers_of_a_row_are_independent():
    """Places beside each other, and places of one block, which share a radius or an angle."""
    drawn = Rng(0, 0, 20_000).sample.normal("noise", (10,))  # three blocks: 0 3 6 9, 1 4 7, 2 5 8
    assert correlations(drawn.T) < 7 / 20_000**0.5
    products = np.corrcoef([(drawn[:, i] * drawn[:, j]).numpy() for i, j in itertools.combinations(range(10), 2)])
    assert np.abs(products - np.eye(45)).max() < 8 / 20_000**0.5


def test_they_are_no_noise_that_images_are_sampled_from():
    """torch's streams of small seeds, as in sampling and validation, and the noise of the teacher's pairs."""
    training = [Rng(seed, step, 4).sample.normal("noise", (5000,)) for seed in (0, 1) for step in (0, 1)]
    sampling = [torch.randn(4, 5000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 10**6)]
    pairs = torch.stack([noise_of(0, row, (5000,)) for row in range(4)])
    old = ScenesRng(0, 0, 4).sample.normal("noise", (5000,))
    assert correlations(torch.cat([*training, *sampling, pairs, old])) < 7 / 5000**0.5
