"""A step of LCM-LoRA on a tiny SDXL, beside the loop of diffusers' own training script, at the same mathematics.

What the script's loop does in every step is written here once more: encode the pictures by the VAE, encode the captions
by both text encoders, make the time ids, noise, ask the student, ask the teacher with the caption and again without
(the same UNet with its adapters off), take the DDIM step, ask the target, pseudo-Huber, backward, clip, AdamW. It loads
and cuts no pictures and clips what it should clip. Ours is `Trainer.step` on encoded data.

First both are given the same pictures, weights and random numbers, and must agree about the loss and its gradient.
Then their steps alternate, also in which comes first, and the median of the ratios of neighbours is reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.data.sources import LatentSource
from fewstep.methods.base import Progress
from fewstep.methods.lcm import LCM, Draws
from fewstep.models.families import UNET_LORA_TARGETS, as_teacher
from fewstep.models.roles import Weights
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles
from tests.models.pipelines import WORDS, build

STEPS, LOW, HIGH, HUBER = 50, 4.0, 16.0, 1e-3  # of the grid; guidance, drawn (the script's w is one less)


class Script:
    """The script's loop on a copy of the pipeline, with its own adapter and optimiser."""

    def __init__(self, pipeline: Any, rank: int, size: int, settings: TrainingSettings) -> None:
        from peft import LoraConfig

        self.pipe, self.size, self.settings = pipeline, size, settings
        self.unet, self.vae = copy.deepcopy(pipeline.unet), pipeline.vae
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(UNET_LORA_TARGETS)))
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.learning_rate, weight_decay=0.0)
        self.bars = pipeline.scheduler.alphas_cumprod
        self.times = torch.arange(1, STEPS + 1) * (1000 // STEPS) - 1
        self.bars_before = torch.cat([self.bars[:1], self.bars[self.times[:-1]]])

    @torch.no_grad()
    def encode(
        self, images: Tensor, captions: list[str], noise: Tensor
    ) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        """(latents, what the network is told, what it is told without a caption)."""
        latents = self.vae.encode(images).latent_dist
        x0 = (latents.mean + latents.std * noise) * self.vae.config.scaling_factor
        embeds, _, pooled, _ = self.pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        ids = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]]).repeat(len(images), 1)
        told = {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        none = {
            "encoder_hidden_states": torch.zeros_like(embeds),
            "added_cond_kwargs": {"text_embeds": torch.zeros_like(pooled), "time_ids": ids},
        }
        return x0, told, none

    def loss(self, images: Tensor, captions: list[str], posterior: Tensor, draws: Draws) -> Tensor:
        x0, told, none = self.encode(images, captions, posterior)
        start = self.times[draws.index]
        below = (start - 1000 // STEPS).clamp_min(0)
        w = (draws.guidance_scale.float() - 1).view(-1, 1, 1, 1)
        noisy = self.pipe.scheduler.add_noise(x0, draws.noise, start)
        said = self.unet(noisy, start, **told).sample
        answer = self.consistent(noisy, said, start)
        with torch.no_grad():
            self.unet.disable_adapters()
            with_caption, without = (self.unet(noisy, start, **how).sample for how in (told, none))
            self.unet.enable_adapters()
            clean, clean_null = (self.clean(noisy, eps, start) for eps in (with_caption, without))
            x, eps = clean + w * (clean - clean_null), with_caption + w * (with_caption - without)
            bar = self.bars_before[draws.index].view(-1, 1, 1, 1)
            landed = (bar.sqrt() * x + (1 - bar).sqrt() * eps).float()
            target = self.consistent(landed, self.unet(landed, below, **told).sample, below)
        return (((answer.float() - target.float()) ** 2 + HUBER**2).sqrt() - HUBER).mean()

    def clean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        bar = self.bars[t].view(-1, 1, 1, 1)
        return (x - (1 - bar).sqrt() * eps) / bar.sqrt()

    def consistent(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        scaled = 10.0 * t.view(-1, 1, 1, 1)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * x + out * self.clean(x, eps, t)

    def step(self, images: Tensor, captions: list[str]) -> None:
        shape = (len(images), self.unet.config.in_channels, images.shape[-1] // 4, images.shape[-1] // 4)
        index = torch.randint(0, STEPS, (len(images),))
        scale = LOW + (HIGH - LOW) * torch.rand(len(images), dtype=torch.float64)
        loss = self.loss(images, captions, torch.randn(shape), Draws(index, torch.randn(shape), scale))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def both(size: int, batch_size: int, rank: int, pool: int = 16) -> tuple[Script, Trainer, Tensor, list[str]]:
    """The two, and the pictures and captions that both train on."""
    from diffusers import DDIMScheduler

    pipeline = copy.copy(build("sdxl"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    settings = TrainingSettings(steps=10**6, batch_size=batch_size, log_every=10**6)
    images = torch.rand(pool, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 5)) for i in range(pool)]
    script = Script(pipeline, rank, size, settings)
    teacher = as_teacher(pipeline, size=size)
    teacher.denoiser.network.unet = copy.deepcopy(pipeline.unet)  # type: ignore[union-attr]
    source = LatentSource(*teacher.encode_images(images), teacher.encode_prompts(captions))
    method = LCM(teacher.denoiser.schedule, num_grid_steps=STEPS, guidance_scale=(LOW, HIGH), huber_c=HUBER)
    roles = build_roles(teacher.denoiser, method, settings, Weights(rank=rank))
    return script, Trainer(method, roles, source, settings), images, captions


def disagreement(script: Script, trainer: Trainer, images: Tensor, captions: list[str]) -> dict[str, float]:
    """Relative distance of losses and of gradients at the same weights, pictures and random numbers."""
    mine = trainer.roles.tensors_of("student")
    with torch.no_grad():
        for name, p in script.unet.named_parameters():
            if ".lora_" in name:
                p.copy_(mine["unet." + name.replace(".default", "")])
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
                mine["unet." + name.replace(".default", "")].copy_(p)
    rng = Rng(3, 0, len(images))
    batch = trainer.source.batch(rng)
    assert isinstance(trainer.source, LatentSource)
    rows = torch.from_numpy(trainer.source.order.rows(rng))
    draws = trainer.method.draw(batch, rng, Progress(0, 1))
    posterior = rng.sample.normal("posterior", batch.x0.shape[1:])
    theirs = script.loss(images[rows], [captions[i] for i in rows], posterior, draws)
    shared = trainer.method.prepare(trainer.roles, Batch(batch.x0, batch.cond), draws, {"student"})
    ours = trainer.method.student(trainer.roles, batch, draws, shared).total  # type: ignore[attr-defined]
    names = [n for n, p in script.unet.named_parameters() if p.requires_grad]
    a = torch.autograd.grad(theirs, script.trained)
    b = torch.autograd.grad(ours, [mine["unet." + n.replace(".default", "")] for n in names])
    apart = sum((x - y).square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    whole = sum(x.square().sum() for x in a).sqrt()
    return {"loss": abs(ours.item() / theirs.item() - 1), "gradient": (apart / whole).item()}


def measure(script: Script, trainer: Trainer, images: Tensor, captions: list[str], pairs: int) -> dict[str, float]:
    """Medians over pairs of steps, whose order alternates; CPU time."""
    each, count = trainer.settings.batch_size, iter(range(10**9))

    def theirs() -> None:
        rows = torch.randint(len(images), (each,))
        script.step(images[rows], [captions[i] for i in rows])

    steps: dict[str, Callable[[], None]] = {"script": theirs, "trainer": lambda: trainer.step(next(count))}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-3, pairs):
        for name in sorted(steps, reverse=bool(i % 2)):
            begun = time.process_time()
            steps[name]()
            if i >= 0:
                taken[name].append(time.process_time() - begun)
    ratios = sorted(a / b for a, b in zip(taken["trainer"], taken["script"], strict=True))
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        **{f"{name}_seconds": statistics.median(times) for name, times in taken.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures; latents are a quarter of it")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = both(options.size, options.batch_size, options.rank)
    apart = disagreement(*parts)
    figures = {**{f"{k}_apart": v for k, v in apart.items()}, **measure(*parts, options.pairs)}
    said = {key: float(f"{value:.4g}") for key, value in figures.items()}
    print(json.dumps({**vars(options), "torch": torch.__version__, **said}))
    print(
        f"A step takes {figures['ratio']:.3f} times the script's CPU time (middle half of {options.pairs} pairs: "
        f"{figures['ratio_low']:.3f} to {figures['ratio_high']:.3f}); losses agree to {apart['loss']:.0e}, gradients "
        f"to {apart['gradient']:.0e}."
    )


if __name__ == "__main__":
    main()
