"""An export is read back by diffusers alone, in a process of its own, and must sample what fewstep samples.

    python -m fewstep.export.round_trip REQUEST.json LATENTS.safetensors

The other process uses none of this package's code: it follows the README's instructions.
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


@dataclass(frozen=True)
class Request:
    """What the other process does.

    Attributes:
        pipeline: folder or hub name. part: the attribute of its network.
        lora, network: files that are put on it, empty for none.
        scheduler: folder of the scheduler's config that replaces the pipeline's, empty for its own; scheduler_class.
        steps, call: of the pipeline's call. prompts, seed: of the samples. size: side in pixels, None for its own.
    """

    pipeline: str
    part: str
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


def check_round_trip(request: Request, expected: Tensor, layers: int) -> RoundTrip:
    """Sample in another process and compare with latents of fewstep from the same seed.

    Args:
        expected: in the pipeline's form (`Family.output_latents`).
        layers: LoRA layers that diffusers must find.

    Raises:
        ValueError: one sentence when the export does not load, or its layers or the shape of its samples differ.
    """
    with tempfile.TemporaryDirectory(prefix="fewstep-round-trip-") as name:
        asked, latents = Path(name) / "request.json", Path(name) / "latents.safetensors"
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "fewstep.export.round_trip", str(asked), str(latents)],
            capture_output=True, encoding="utf-8", errors="replace", check=False,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))},
        )  # fmt: skip
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise ValueError(f"The export does not work in diffusers: {last[:300]}")
        read = load_file(latents)
    found, sampled = int(read["layers"]), read["latents"]
    if found != layers:
        raise ValueError(f"diffusers found {found} of the export's {layers} LoRA layers.")
    if sampled.shape != expected.shape:
        shapes = f"{tuple(sampled.shape)} where fewstep's are {tuple(expected.shape)}"
        raise ValueError(f"The export's latents in diffusers are {shapes}.")
    return RoundTrip(float((sampled - expected.float()).abs().max() / expected.abs().max()), found)


def sample_in_diffusers(request: dict[str, Any]) -> dict[str, Tensor]:
    """The other process: the pipeline's latents in float32, and how many LoRA layers diffusers found."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    parts = {"safety_checker": None} if _has_checker(request["pipeline"]) else {}
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(request["pipeline"], use_safetensors=True, **parts)
    part = request["part"]
    if request["lora"]:
        path = Path(request["lora"])
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    if request["network"]:
        setattr(pipe, part, type(getattr(pipe, part)).from_pretrained(request["network"], use_safetensors=True))
    if request["scheduler"]:
        pipe.scheduler = getattr(diffusers, request["scheduler_class"]).from_pretrained(request["scheduler"])
    pipe.to(request["device"])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(request["seed"])  # the global one: some pipelines hand schedulers no generator
    call = {**request["call"], "num_inference_steps": request["steps"]}
    if call.keys() & {"timesteps", "sigmas"}:
        del call["num_inference_steps"]
    if "negative_prompt" in call:  # Qwen's pipelines do not repeat one for all prompts
        call["negative_prompt"] = [call["negative_prompt"]] * len(request["prompts"])
    if request["size"] is not None:
        call |= {"height": request["size"], "width": request["size"]}
    latents = pipe(prompt=list(request["prompts"]), generator=generator, output_type="latent", **call).images
    layers = sum(hasattr(m, "lora_A") and len(m.lora_A) > 0 for m in getattr(pipe, part).modules())
    return {"latents": latents.float().cpu().contiguous(), "layers": torch.tensor(layers)}


def _has_checker(name: str) -> bool:
    """Whether a pipeline has a safety checker, which blackens images of random students; latents need none."""
    index = Path(name) / "model_index.json"
    return index.is_file() and "safety_checker" in json.loads(index.read_text(encoding="utf-8"))


if __name__ == "__main__":
    save_file(sample_in_diffusers(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), sys.argv[2])
