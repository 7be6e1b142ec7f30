"""Figures that are kept without their runs."""

import torch

from benchmarks import kept
from fewstep.evaluation.result import Result


def test_figures_and_resamplings_are_kept_and_seeds_are_added(tmp_path):
    file, values = tmp_path / "kept.safetensors", {"FD": torch.rand(5).double(), "KID": torch.rand(5).double()}
    for seed in (0, 1):
        result = Result("tdm", 4, torch.rand(2, 3, 4, 4), {"FD": 0.1 + seed, "KID": 0.2}, resampled=values, seed=seed)
        home = tmp_path / f"runs-{seed}" / f"tdm-s{seed}" / "measured"
        home.mkdir(parents=True)
        result.save(home / "4.safetensors")
        kept.write(file, kept.read(file) | kept.in_runs(tmp_path / f"runs-{seed}"))
    found = kept.read(file)
    assert {label: r.figures["FD"] for label, r in found.items()} == {"tdm-s0/4": 0.1, "tdm-s1/4": 1.1}
    again = found["tdm-s1/4"]
    assert (again.model, again.steps, again.seed, again.figures["KID"]) == ("tdm", 4, 1, 0.2)
    assert again.resampled.keys() == {"FD"}
    torch.testing.assert_close(again.resampled["FD"], values["FD"].float().double(), rtol=0, atol=0)
