"""Hostile command lines, chosen by a seed."""

from __future__ import annotations

import random
from pathlib import Path

VALUES = (
    "", " ", "nan", "-inf", "1e400", "-1", "0", "0.5", "7", str(10**19), str(2**64), "x", "\x07", "\udcff", "ä" * 300,
    "../..", "/", "/dev/null", "/proc/x", "~", "a=b", "[[", "{a: ", "%s", "-h x", "scenes-64", "999,1", ",", "x:nan",
)  # fmt: skip
SAMPLE = ("--steps", "--timesteps", "--sampler", "--eta", "--guidance-scale", "--negative-prompt", "--lora", "--image",
          "--mask", "--strength", "--seed", "--out", "--base", "--file", "--device", "--checkpoint")  # fmt: skip
OTHERS: tuple[tuple[str, ...], ...] = (
    ("export", "?"), ("export", "?", "--to", "?"), ("export", "?", "--dtype", "?"), ("checkpoints", "?"),
    ("recipes", "show", "?"), ("recipes", "copy", "scenes-64-tcd", "?"), ("diagnose", "?"), ("report", "?"),
    ("verify", "?"), ("verify", "lcm", "--steps", "0", "--mixture", "?"), ("doctor", "--plan", "?"),
    ("distill", "?", "--dry-run"), ("distill", "scenes-64-tcd", "--dry-run", "--set", "?"),
    ("distill", "scenes-64-tcd", "--dry-run", "--set", "?=?"), ("prepare", "?", "--out", "?"),
    ("benchmark", "scenes-64-tcd", "--list", "--seeds", "?"), ("benchmark", "?", "--list", "--steps", "?"),
    ("benchmark", "scenes-64-tcd", "--list", "--slice", "?"), ("scenes", "/dev/null/x", "--count", "?"),
    ("reward", "train", "?"), ("teacher", "measure", "--guidance", "?", "--count", "0"),
)  # fmt: skip


def command_line(rng: random.Random, teacher: Path) -> list[str]:
    """A command with one to three values that make no sense; most are `fewstep sample`, which has most options."""
    if rng.random() < 0.5:
        return [
            rng.choice(VALUES) if word == "?" else word.replace("?", rng.choice(VALUES)) for word in rng.choice(OTHERS)
        ]
    words = ["sample", str(teacher), "-p", rng.choice(("a", *VALUES)), "--steps", "1"]
    for option in rng.sample(SAMPLE, rng.randint(1, 3)):
        words += [option, rng.choice(VALUES)]
    return words
