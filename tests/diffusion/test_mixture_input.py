"""What a mixture may be made from: files that round-trip, and one clear sentence for every mistake."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.diffusion.mixture import GaussianMixture

GOOD = {"weights": [0.25, 0.75], "means": [[0, 1], [2, 3]], "stds": [0.5, 1]}
EYE = [[1, 0], [0, 1]]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file(tmp_path):
    mixture = GaussianMixture.from_json(write(tmp_path / "a.json", GOOD | {"class_weights": [[1, 0], [0.5, 0.5]]}))
    assert (mixture.dim, mixture.num_components, mixture.num_classes) == (2, 2, 2)
    assert mixture.means.dtype == torch.float64 and mixture.components.variances.tolist() == [[0.25], [1.0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 999))
def test_files_round_trip_to_the_last_bit(tmp_path_factory, count, dim, full, classes, seed):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(count))
    root = rng.normal(size=(count, dim, dim))
    shape = (
        {"covariances": root @ root.transpose(0, 2, 1) + np.eye(dim)} if full else {"stds": rng.uniform(0.1, 2, count)}
    )
    given_classes = rng.dirichlet(np.ones(count), size=3) if classes else None
    mixture = GaussianMixture(weights, rng.normal(size=(count, dim)), class_weights=given_classes, **shape)
    path = tmp_path_factory.mktemp("m") / "m.json"
    mixture.to_json(path)
    again = GaussianMixture.from_json(path)
    x = torch.randn(5, dim, dtype=torch.float64)
    for label in (None, 2) if classes else (None,):
        assert torch.equal(mixture.score(x, 0.6, 0.8, label), again.score(x, 0.6, 0.8, label))


def test_rounded_weights_are_made_exact():
    mixture = GaussianMixture([0.333, 0.333, 0.333], [0, 1, 2], [1, 1, 1])
    assert mixture.weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)


def test_lists_arrays_and_tensors():
    for kind in (list, np.asarray, torch.tensor):
        mixture = GaussianMixture(kind([0.5, 0.5]), kind([0.0, 1.0]), kind([1.0, 2.0]))
        assert mixture.dim == 1 and mixture.means.shape == (2, 1)


MISTAKES = {
    "unknown key": (GOOD | {"sigmas": [1]}, "unknown key 'sigmas': use weights, means, stds"),
    "no weights": ({k: v for k, v in GOOD.items() if k != "weights"}, "the key 'weights' is missing"),
    "no means": ({k: v for k, v in GOOD.items() if k != "means"}, "the key 'means' is missing"),
    "no shape": ({k: v for k, v in GOOD.items() if k != "stds"}, "exactly one of stds and covariances"),
    "two shapes": (GOOD | {"covariances": [EYE, EYE]}, "exactly one of stds and covariances"),
    "sum": (GOOD | {"weights": [0.5, 0.6]}, "weights must sum to 1, not to 1.1"),
    "negative": (GOOD | {"weights": [-0.5, 1.5]}, "weights must not be negative"),
    "nothing": (GOOD | {"weights": []}, "weights must be 1-dimensional and not empty"),
    "nested weights": (GOOD | {"weights": [[0.5, 0.5]]}, r"not of shape \[1, 2\]"),
    "lengths": (GOOD | {"means": [[0, 1]]}, "one row for each of the 2 weights, not 1 rows"),
    "ragged": (GOOD | {"means": [[0, 1], [2]]}, "means has rows of different lengths"),
    "words": (GOOD | {"means": [["a", "b"], ["c", "d"]]}, "means must hold numbers only"),
    "truth": (GOOD | {"stds": [True, True]}, "stds must hold numbers only"),
    "null": (GOOD | {"weights": None}, "weights must hold numbers only"),
    "infinite": ('{"weights": [1], "means": [NaN], "stds": [1]}', "means must be finite"),
    "std shape": (GOOD | {"stds": [1, 1, 1]}, r"stds must have shape \[2\] or \[2, 2\], not \[3\]"),
    "std zero": (GOOD | {"stds": [0, 1]}, "stds must be positive"),
    "covariance shape": (
        {"weights": [1], "means": [[0, 0]], "covariances": EYE},
        r"covariances must be 3-dimensional and not empty, not of shape \[2, 2\]",
    ),
    "covariance size": (
        {"weights": [1], "means": [[0, 0]], "covariances": [[[1]]]},
        r"covariances must have shape \[1, 2, 2\], not \[1, 1, 1\]",
    ),
    "indefinite": (
        {"weights": [1], "means": [[0, 0]], "covariances": [[[1, 2], [2, 1]]]},
        "covariances must be positive definite",
    ),
    "singular": (
        {"weights": [1], "means": [[0, 0]], "covariances": [[[1, 1], [1, 1]]]},
        "covariances must be positive definite",
    ),
    "zero": (
        {"weights": [1], "means": [[0, 0]], "covariances": [[[0, 0], [0, 0]]]},
        "covariances must be positive definite",
    ),
    "asymmetric": (
        {"weights": [1], "means": [[0, 0]], "covariances": [[[1, 0.5], [0, 1]]]},
        "covariances must be symmetric",
    ),
    "class shape": (
        GOOD | {"class_weights": [[1, 0, 0]]},
        r"class_weights must have shape \[classes, 2\], not \[1, 3\]",
    ),
    "class sum": (GOOD | {"class_weights": [[1, 0], [1, 1]]}, "class_weights must sum to 1 in every row, not to 2"),
    "list": ("[1, 2]", "must hold one object with the keys weights"),
    "broken": ('{"weights": [1,', "is not valid JSON"),
    "binary": ("\x00", "is not valid JSON"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_is_one_sentence_with_its_name(tmp_path, name):
    content, message = MISTAKES[name]
    path = write(tmp_path / "my mixture.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        GaussianMixture.from_json(path)
    text = str(caught.value)
    assert text.startswith(f"Mixture file {path}: ") and "\n" not in text and text.endswith(".")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none.json: it cannot be read \(No such file"):
        GaussianMixture.from_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="it cannot be read"):
        GaussianMixture.from_json(tmp_path)
