"""Kernels and casts of one forward in bf16, counted on the meta device: the teacher's and its student's.

    python benchmarks/kernel_counts.py stabilityai/stable-diffusion-xl-base-1.0 black-forest-labs/FLUX.1-dev
    python benchmarks/kernel_counts.py stabilityai/stable-diffusion-xl-base-1.0 --weights full

Not named kernels.py: scripts of this folder would hide the package of that name, which transformers looks for.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.models.meta_pipeline import outline
from fewstep.models.precision import refresh
from fewstep.models.roles import Roles, Weights
from fewstep.planning.memory_trace import DeviceRules

_VIEWS = """view _unsafe_view expand slice transpose permute t unsqueeze squeeze select split split_with_sizes chunk
    unbind detach alias as_strided reshape _reshape_alias unflatten empty empty_like empty_strided new_empty"""
NO_KERNEL = frozenset(_VIEWS.split())
"""Operators that compute nothing: views, and memory without values."""


class Kernels(TorchDispatchMode):
    """Counts operators that compute, and casts from one number format to another.

    Attributes:
        count: kernels by operator. casts: how many of them are casts. moved: bytes that casts read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.casts, self.moved = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name not in NO_KERNEL:
            self.count[name] += 1
        if name == "_to_copy" and args[0].dtype != result.dtype:
            self.casts += 1
            self.moved += args[0].nbytes + result.nbytes
        return result


def measure(name: str, weights: str = "lora", rank: int = 64) -> dict[str, Any]:
    """Kernels, casts and gigabytes that they move, of the teacher's forward and the student's with its graph."""
    model = outline(name, dtype=torch.bfloat16)
    denoiser = model.denoiser()
    with torch.device("meta"):
        roles = Roles(denoiser, autocast=torch.bfloat16)
        roles.add("student", Weights(weights, rank))  # type: ignore[arg-type]
    refresh(roles.shadows())  # as after every update
    x, cond = torch.empty(1, *model.latent_shape, device="meta"), model.prompts(1, torch.float32)
    found: dict[str, Any] = {"model": name, "weights": weights, "rank": rank}
    for role in ("teacher", "student"):
        with torch.set_grad_enabled(role == "student"), DeviceRules("cuda"), Kernels() as kernels:
            getattr(roles, role)(x, 0.5 * denoiser.schedule.start, cond)
        found[role] = {
            "kernels": sum(kernels.count.values()), "casts": kernels.casts, "cast_gb": round(kernels.moved / 1e9, 2)
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="diffusers folders or names on the hub; no weights are read")
    parser.add_argument("--weights", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    for name in options.models:
        found = measure(name, options.weights, options.rank)
        print(json.dumps(found))
        teacher, student = found["teacher"], found["student"]
        print(
            f"{name}: a student's forward takes {student['kernels']:,} kernels, "
            f"{student['kernels'] / teacher['kernels']:.2f} times the teacher's, "
            f"and casts {student['cast_gb']} GB where the teacher casts {teacher['cast_gb']} GB."
        )


if __name__ == "__main__":
    main()
