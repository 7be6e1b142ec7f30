"""What each figure says, and whether a small or a large one is good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """A figure's meaning in a few words.

    Attributes:
        what: what is measured. better: which direction is good; empty where neither is.
    """

    what: str
    better: Literal["lower", "higher", ""] = ""

    def __str__(self) -> str:
        return self.what + (f"; {self.better} is better" if self.better else "")


FIGURES = {
    "evaluations": Figure("network evaluations per image, both branches of guidance counted"),
    "ms": Figure("milliseconds of sampling per image, without decoding"),
    "FD": Figure("Frechet distance of features to the reference images", "lower"),
    "KID": Figure("unbiased kernel distance of the same features, about 0 for equal distributions", "lower"),
    "detail FD": Figure("Frechet distance of 8x8 patches to the reference images, without a network", "lower"),
    "accuracy": Figure("share of images that show everything their prompt states, by the detector", "higher"),
    "precision": Figure("share of generated images that lie among reference images", "higher"),
    "recall": Figure("share of reference images that lie among the generated ones", "higher"),
    "density": Figure("number of reference neighbourhoods in which a generated image lies, 1 for equal distributions"),
    "coverage": Figure("share of reference neighbourhoods that hold a generated image", "higher"),
    "spread": Figure("mean distance of two images of one prompt, in features", "higher"),
    "to first": Figure("root mean square pixel difference to the first row, same prompts and noise", "lower"),
    "unlike first": Figure("1 - cosine of an image's features and the first row's, same prompts and noise", "lower"),
    "to teacher": Figure("root mean square pixel difference to the teacher's image of the same prompt and noise",
                         "lower"),
    "unlike teacher": Figure("1 - cosine of an image's features and those of the teacher's image of the same prompt "
                             "and noise", "lower"),
    "perceptual": Figure("perceptual distance to the teacher's image of the same prompt and noise, over all stages of "
                         "the ImageNet network", "lower"),
    "CLIP score": Figure("cosine of an image's and its prompt's CLIP embeddings", "higher"),
    "PickScore": Figure("PickScore of an image and its prompt: what people preferred in comparisons", "higher"),
    "aesthetic": Figure("predicted rating of an image's looks from 1 to 10, its prompt unseen", "higher"),
}  # fmt: skip
"""The figures of a model, in the order of tables."""

MAIN = ("FD", "KID", "detail FD", "recall", "accuracy", "to teacher", "unlike teacher", "perceptual", "CLIP score",
        "PickScore", "aesthetic", "spread", "evaluations")  # fmt: skip
"""The figures that reports, benchmarks and evaluations show first, where they are measured."""

SHORT = ("evaluations", "ms", "FD", "detail FD", "accuracy", "to first")
"""The figures of the table in a terminal."""

OF_FIRST = ("to first", "unlike first")
"""Figures that compare with the first of several models."""
DECIDING = tuple(name for name, figure in FIGURES.items() if figure.better and name not in (*OF_FIRST, "spread"))
"""The figures by which the best of several students can be chosen."""


def figure(name: str) -> Figure:
    """What a figure says, also that of an attribute, such as "accuracy of colour"."""
    _, found, of = name.partition("accuracy of ")
    if found:
        return Figure(f"share of stated values of {of} that images show, by the detector", "higher")
    return FIGURES.get(name) or Figure(name)  # of another version of fewstep


def best_first(name: str, value: float) -> float:
    """A number that is smaller for a better value of the figure ``name``."""
    return -value if FIGURES[name].better == "higher" else value
