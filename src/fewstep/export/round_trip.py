"""An export is read back by diffusers alone, in a process of its own, and must draw what fewstep draws.

    python -m fewstep.export.round_trip QUESTION.json ANSWER.safetensors

The child knows none of this package's code: it does what the README tells its readers to do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMITS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest gap by the weights' dtype: beyond it a file is wrong, not rounded."""


@dataclass(frozen=True)
class Question:
    """What the other process does.

    Attributes:
        pipeline: folder or hub name. lora, network: what is put on it, empty for nothing.
        scheduler: folder of the scheduler's config that replaces the pipeline's, empty for its own; scheduler_class.
        steps, call: of the pipeline's call. prompts, seed: what is drawn. size: side in pixels, None for its own.
    """

    pipeline: str
    steps: int
    prompts: tuple[str, ...]
    lora: str = ""
    network: str = ""
    scheduler: str = ""
    scheduler_class: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    size: int | None = None


@dataclass(frozen=True)
class RoundTrip:
    """How an export compares.

    Attributes:
        gap: largest difference of the latents, as a part of the largest latent.
        layers: LoRA layers that diffusers found in the file; 0 for none.
    """

    gap: float
    layers: int


def prove(question: Question, expected: Tensor, layers: int, limit: float) -> RoundTrip:
    """Ask another process and compare; ``expected`` are latents [B, C, h, w] that fewstep drew from the same seed.

    Args:
        layers: LoRA layers that must have been found. limit: of the gap.

    Raises:
        ValueError: one sentence when the export does not load, or draws something else.
    """
    with tempfile.TemporaryDirectory(prefix="fewstep-proof-") as name:
        asked, answer = Path(name) / "question.json", Path(name) / "answer.safetensors"
        asked.write_text(json.dumps(asdict(question)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "fewstep.export.round_trip", str(asked), str(answer)],
            capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))},
        )  # fmt: skip
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"The export does not work in diffusers: {last[:300]}")
        read = load_file(answer)
    found, drawn = int(read["layers"]), read["latents"]
    if found != layers:
        raise ValueError(f"diffusers found {found} of the export's {layers} LoRA layers.")
    if drawn.shape != expected.shape:
        raise ValueError(f"The export draws latents {tuple(drawn.shape)} where fewstep draws {tuple(expected.shape)}.")
    gap = float((drawn - expected.float()).abs().max() / expected.abs().max())
    if not gap <= limit:
        raise ValueError(f"The export draws something else than fewstep in diffusers: the gap is {gap:.1e}.")
    return RoundTrip(gap, found)


def answer(question: dict[str, Any]) -> dict[str, Tensor]:
    """What diffusers draws: latents [B, C, h, w] in float32, and how many LoRA layers it found."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    parts = {"safety_checker": None} if _has_checker(question["pipeline"]) else {}
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(question["pipeline"], use_safetensors=True, **parts)
    network = "unet" if hasattr(pipe, "unet") else "transformer"
    if question["lora"]:
        path = Path(question["lora"])
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    if question["network"]:
        setattr(pipe, network, type(getattr(pipe, network)).from_pretrained(question["network"], use_safetensors=True))
    if question["scheduler"]:
        pipe.scheduler = getattr(diffusers, question["scheduler_class"]).from_pretrained(question["scheduler"])
    pipe.to(question["device"])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(question["seed"])  # the global one: SD3's pipeline hands schedulers no generator
    call = {**question["call"], "num_inference_steps": question["steps"]}
    if call.keys() & {"timesteps", "sigmas"}:
        del call["num_inference_steps"]
    if question["size"] is not None:
        call |= {"height": question["size"], "width": question["size"]}
    drawn = pipe(list(question["prompts"]), generator=generator, output_type="latent", **call).images
    if drawn.ndim == 3:  # FLUX packs patches of 2x2 into tokens
        side = question["size"] or pipe.default_sample_size * pipe.vae_scale_factor
        drawn = pipe._unpack_latents(drawn, side, side, pipe.vae_scale_factor)
    layers = sum(hasattr(m, "lora_A") and len(m.lora_A) > 0 for m in getattr(pipe, network).modules())
    return {"latents": drawn.float().cpu().contiguous(), "layers": torch.tensor(layers)}


def _has_checker(name: str) -> bool:
    """A checker of pictures blackens what random students draw; latents need none."""
    index = Path(name) / "model_index.json"
    return index.is_file() and "safety_checker" in json.loads(index.read_text(encoding="utf-8"))


if __name__ == "__main__":
    save_file(answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), sys.argv[2])
