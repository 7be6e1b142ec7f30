"""What sampling costs beyond the networks, and beside the diffusers pipeline of the same model.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py [--rounds 9] [--batch-size 16] [--device cpu]

scenes-64, from one noise, in three ways: bare calls of the network (guided ones with both branches in one batch, as the
other two have it), `fewstep.sample`, and the pipeline with the scheduler that `fewstep export` writes.
First all must draw the same; then they take turns, and medians of the ratios of neighbours are reported. The last
column is from prompts to pictures, text encoder and decoder included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.export.scheduler import build_scheduler, plan_scheduler
from fewstep.models.cond import Cond
from fewstep.sampling import make_sampler, sample
from fewstep.scenes64.scenes import Scenes

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "tcd, 1 step": ("tcd", {"num_inference_steps": 1, "eta": 0.0}, 1.0),
    "tcd, 4 steps": ("tcd", {"num_inference_steps": 4, "eta": 0.0}, 1.0),
    "ddim, 25 steps, guided": ("ddim", {"num_inference_steps": 25}, 3.0),
}
"""Sampler, its options, guidance scale."""


class Case:
    """One sampler on one model, ready to run in every way."""

    def __init__(self, name: str, batch_size: int, device: str) -> None:
        kind, self.options, self.scale = CASES[name]
        self.model = fewstep.load("scenes-64", device=device)
        self.kind, self.sampler = kind, make_sampler(kind, **self.options)
        self.prompts = [Scenes(0).scene(i).caption for i in range(batch_size)]
        teacher = self.model.teacher
        self.pipeline, self.denoiser = teacher.pipeline, teacher.denoiser
        self.cond = teacher.encode_prompts(self.prompts)
        noise = torch.randn(batch_size, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(device)
        plan = plan_scheduler(
            self.sampler, self.denoiser.schedule, dict(self.pipeline.scheduler.config),
            self.denoiser.prediction_type, type(teacher.family),
        )  # fmt: skip
        self.pipeline.scheduler = build_scheduler(plan)
        self.pipeline.set_progress_bar_config(disable=True)
        steps = {} if "timesteps" in plan.call else {"num_inference_steps": self.sampler.num_inference_steps}
        self.call = {**plan.call, **steps, "guidance_scale": self.scale if self.scale > 1 else 0.0}
        with torch.no_grad():
            embeds, empty = self.pipeline.encode_prompt(self.prompts, self.noise.device, 1, True)
        self.embeds = {"prompt_embeds": embeds, "negative_prompt_embeds": empty}

    @torch.no_grad()
    def bare(self) -> None:
        """The network's calls alone, on inputs that are ready."""
        network, x, cond = self.denoiser.network, self.noise, self.cond
        if self.scale > 1:
            x, cond = torch.cat([x, x]), Cond.cat([cond.null(), cond])
        for t in self.sampler.times(self.denoiser.schedule)[:-1].tolist():
            network(x, torch.full((len(x),), int(t), device=x.device), cond)

    def ours(self) -> Tensor:
        """Latents, from encoded prompts."""
        return sample(self.denoiser, self.sampler, self.noise, self.cond, self.scale).x0

    def theirs(self) -> Tensor:
        """The same by the pipeline."""
        latents: Tensor = self.pipeline(**self.embeds, latents=self.noise, output_type="latent", **self.call).images
        return latents

    def our_pictures(self) -> Tensor:
        """Pictures, from prompts."""
        return self.model.generate(
            self.prompts, sampler=self.kind, guidance_scale=self.scale, latents=self.noise, **self.options
        ).images

    def their_pictures(self) -> Tensor:
        """The same by the pipeline."""
        pictures: Tensor = self.pipeline(self.prompts, latents=self.noise, output_type="pt", **self.call).images
        return pictures

    def agreement(self) -> float:
        """Largest difference of the latents over the largest latent, and of the pictures."""
        ours, theirs = self.ours(), self.theirs()
        pictures = float((self.our_pictures() - self.their_pictures()).abs().max())
        return max(float((ours - theirs).abs().max() / ours.abs().max()), pictures)


def seconds(work: Callable[[], Any], device: str) -> float:
    """CPU time of one run; on an accelerator the clock's, until it is done."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    begun = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begun


def measure(case: Case, rounds: int, device: str) -> dict[str, float]:
    """Medians of ratios; who comes first alternates."""
    ways = [case.bare, case.ours, case.theirs, case.our_pictures, case.their_pictures]
    for way in ways:
        way()
    taken = []
    for i in range(rounds):
        order = ways[:: -1 if i % 2 else 1]
        taken.append({way.__name__: seconds(way, device) for way in order})

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(row[a] / row[b] for row in taken), 3)

    return {
        "over bare calls": ratio("ours", "bare"), "pipeline over bare calls": ratio("theirs", "bare"),
        "over the pipeline": ratio("ours", "theirs"),
        "prompts to pictures, over the pipeline": ratio("our_pictures", "their_pictures"),
        "bare seconds": round(statistics.median(row["bare"] for row in taken), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for name in CASES:
        case = Case(name, options.batch_size, options.device)
        gap = case.agreement()
        if gap > 1e-4:
            raise SystemExit(f"{name}: fewstep and the pipeline differ by {gap:.1e}: nothing to compare.")
        figures = measure(case, options.rounds, options.device)
        print(
            json.dumps({"case": name, **vars(options), "torch": torch.__version__, "gap": gap, **figures}), flush=True
        )


if __name__ == "__main__":
    main()
