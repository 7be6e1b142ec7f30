"""What the trainer costs beyond the networks: CPU time of one `Trainer` step over that of a hand-written bare step.

The bare step makes the same network calls, backward, clipping, fused AdamW and EMA, on inputs that are ready, and
nothing else: no drawing, no noising, no jumps, no loss but a mean square, no statistics. Both run on the UNet of
scenes-64 with random weights: TCD with guidance, LoRA of rank 32. They alternate, so that whatever else the machine
does meets both alike, and the median of the ratios of neighbours is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from fewstep.data.random import Rng
from fewstep.data.sources import LatentSource
from fewstep.methods.tcd import TCD
from fewstep.models.cond import Cond
from fewstep.models.families import as_teacher
from fewstep.models.lora import live
from fewstep.models.roles import Weights
from fewstep.scenes64.architecture import LATENT_SHAPE, build_pipeline
from fewstep.scenes64.scenes import WORDS
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer, build_roles

RANK, GUIDANCE, EMA, POOL = 32, 4.0, 0.99, 256


def build_trainer(batch_size: int, seed: int) -> Trainer:
    """TCD with guidance on a LoRA of scenes-64's architecture, latents and text from random numbers."""
    teacher = as_teacher(build_pipeline(WORDS, seed))
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.randn(POOL, *LATENT_SHAPE, generator=generator) for _ in range(2))
    words = [WORDS[i % len(WORDS)] for i in range(POOL)]
    source = LatentSource(mean, 0.1 * std.abs(), teacher.encode_prompts(words))
    settings = TrainingSettings(steps=10**6, batch_size=batch_size, ema_decay=EMA, log_every=10**6)
    method = TCD(teacher.denoiser.schedule, guidance_scale=GUIDANCE)
    roles = build_roles(teacher.denoiser, method, settings, Weights(rank=RANK), seed)
    return Trainer(method, roles, source, settings, seed=seed)


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """The networks, the optimiser and the EMA of one step, and nothing around them."""
    network, parameters = trainer.roles.base, trainer.roles.parameters("student")
    average = list(trainer.roles.tensors_of("ema").values())
    settings = trainer.settings
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    batch = trainer.source.batch(Rng(0, 0, settings.batch_size))
    assert batch.cond is not None
    x, cond = batch.x0, batch.cond
    t = torch.linspace(19, 999, len(x)).long()
    twice, times, both = torch.cat([x, x]), torch.cat([t, t]), Cond.cat([cond.null(), cond])

    def step() -> None:
        with torch.no_grad():
            network(twice, times, both)  # the teacher, guided
            with live(("student",)):
                network(x, t, cond)  # the target
        with live(("student",)):
            loss = network(x, t, cond).square().mean()
        loss.backward(inputs=parameters)
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, parameters, 1 - EMA)

    return step


def seconds(step: Callable[[], None]) -> float:
    """CPU time of one step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(batch_size: int, steps: int, seed: int, warmup: int = 3) -> dict[str, float]:
    """Medians over ``steps`` pairs, whose order alternates."""
    trainer = build_trainer(batch_size, seed)
    bare, count = bare_step(trainer), iter(range(10**9))
    kinds = {"bare": bare, "trainer": lambda: trainer.step(next(count))}
    for _ in range(warmup):
        for step in kinds.values():
            step()
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for i in range(steps):
        for name in sorted(kinds, reverse=bool(i % 2)):
            taken[name].append(seconds(kinds[name]))
    ratios = sorted(a / b for a, b in zip(taken["trainer"], taken["bare"], strict=True))
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "bare_seconds": statistics.median(taken["bare"]),
        "trainer_seconds": statistics.median(taken["trainer"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps to measure")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    options = parser.parse_args()
    if min(options.steps, options.batch_size, options.threads) < 1:
        parser.error("--steps, --batch-size and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    figures = measure(options.batch_size, options.steps, options.seed)
    print(json.dumps({**vars(options), "torch": torch.__version__, **{k: round(v, 5) for k, v in figures.items()}}))
    print(
        f"A trainer step takes {figures['ratio']:.3f} times the CPU time of the bare step "
        f"(middle half of {options.steps} pairs: {figures['ratio_low']:.3f} to {figures['ratio_high']:.3f}; "
        f"{1000 * figures['bare_seconds']:.0f} ms bare, {1000 * figures['trainer_seconds']:.0f} ms with the trainer)."
    )


if __name__ == "__main__":
    main()
