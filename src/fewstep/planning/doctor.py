"""`fewstep doctor`: what this machine has, what it lacks, and whether it computes the right numbers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.data.random import Rng
from fewstep.methods.base import Progress
from fewstep.methods.tcd import TCD
from fewstep.models.compiled import check_compiler
from fewstep.models.families import load_teacher
from fewstep.models.hub import short_error
from fewstep.models.roles import Weights
from fewstep.training.machine import in_words, memory
from fewstep.training.settings import TrainingSettings
from fewstep.training.step import losses, trained_by
from fewstep.training.trainer import build_roles

OK, NOTE, PROBLEM = "OK", "note", "problem"
_LITTLE_MEMORY, _LITTLE_DISK = 2e9, 5e9  # bytes; with less, full-size models are out of reach
_NO_DISK = 200e6  # bytes; a run of scenes-64 needs about this much
_TOLERANCE = 0.01  # relative, float32 against float64; TF32 convolutions stay below it, a wrong kernel does not
_GIVES = {
    "lowmem": "training.optimizer adamw8bit, moments in a quarter of the memory",
    "data": "data.source parquet and datasets",
    "metrics": "image features for measurements without a model hub",
}
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)""")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: OK, a note or a problem; what was found; what to do about it."""

    level: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:8} {self.text}" + (f" -> {self.advice}" if self.advice else "")


def examine(runs: Path = Path("runs")) -> Iterator[Finding]:
    """All findings about this machine, each as soon as it is known; ``runs`` is the folder of future runs."""
    yield Finding(OK, f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _torch()
    yield _memory()
    yield _disk(runs)
    yield _products()
    yield _compiler()
    yield from packages(_requirements())
    yield _torchvision()
    yield _hub_cache()
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in (name for name, found in there.items() if found):
        yield _numbers(device)


def _torch() -> Iterator[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    yield Finding(OK, f"torch {torch.__version__} ({build}) uses {threads} of {cores} processor threads")
    if threads > cores:
        yield Finding(NOTE, f"{threads} threads slow each other on {cores} processors", f"set OMP_NUM_THREADS={cores}")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Finding(OK, f"cuda:{i} is {name}, and {in_words(free)} of its {in_words(total)} are free")
    if torch.backends.mps.is_available():
        yield Finding(NOTE, "there is an Apple GPU (mps)", "use it if its numbers below agree; long runs are untested")
    elif not torch.cuda.is_available():
        if torch.version.cuda and Path("/proc/driver/nvidia").exists():
            yield Finding(
                PROBLEM, "torch cannot use the NVIDIA GPU of this machine", "update the driver, see nvidia-smi"
            )
        else:
            yield Finding(NOTE, "there is no GPU", "scenes-64 does without; full-size models need one")


def _products() -> Finding:
    """Which shortcuts float32 products take on CUDA, and which attention PyTorch may choose there: its own defaults."""
    kept = {True: "TF32's 10 bits", False: "float32"}
    products, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    flags = torch.backends.cuda
    kinds = {"flash": flags.flash_sdp_enabled(), "memory-efficient": flags.mem_efficient_sdp_enabled(),
             "cuDNN": flags.cudnn_sdp_enabled(), "plain": flags.math_sdp_enabled()}  # fmt: skip
    names = ", ".join(name for name, is_on in kinds.items() if is_on)
    text = f"on CUDA float32 matrix products keep {kept[products]} and convolutions {kept[cudnn]}"
    return Finding(OK, f"{text}; attention is PyTorch's, by the fastest kernel that fits of {names}")


def _compiler() -> Finding:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_compiler(device)
    except ValueError as error:
        return Finding(NOTE, short_error(error))
    return Finding(OK, f"training.compile finds its compiler for {device}")


def _memory() -> Finding:
    free, total = memory("cpu") or (0, 0)
    text = f"{in_words(free)} of {in_words(total)} of memory are free"
    return Finding(NOTE, text, "this suffices for scenes-64 only") if free < _LITTLE_MEMORY else Finding(OK, text)


def _disk(runs: Path) -> Finding:
    place = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    text = f"{in_words(free)} of disk are free in {place}, where runs would go"
    if not os.access(place, os.W_OK):
        return Finding(PROBLEM, f"{place} is not writable", "give another folder with --out")
    if free < _NO_DISK:
        return Finding(PROBLEM, text, "make room, or give another folder with --out")
    if free < _LITTLE_DISK:
        return Finding(NOTE, text, "checkpoints of full-size models need more")
    return Finding(OK, text)


# ---------------------------------------------------------------- packages


def _requirements() -> list[str]:
    try:
        return requires("fewstep") or []
    except PackageNotFoundError:
        return []


def packages(requirements: Iterable[str], find: Callable[[str], str] = version) -> Iterator[Finding]:
    """Installed versions against ``requirements``, written as in pyproject.toml.

    Args:
        find: returns a package's version.
    """
    from packaging.requirements import Requirement

    read = [Requirement(text) for text in requirements]
    extras: dict[str, list[str]] = {}
    if not read:
        yield Finding(NOTE, "fewstep is not installed, so versions were not compared", "pip install -e .")
    for wanted in read:
        extra = _EXTRA.search(str(wanted.marker))
        if extra:
            extras.setdefault(extra[1], []).append(wanted.name)
            continue
        found = _version(wanted.name, find)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            text = f"{wanted.name} is missing" if found is None else f"{wanted.name} {found} is not {wanted.specifier}"
            yield Finding(PROBLEM, text, f"pip install '{wanted.name}{wanted.specifier}'")
        else:
            yield Finding(OK, f"{wanted.name} {found}" + (f" ({wanted.specifier})" if wanted.specifier else ""))
    extras.pop("dev", None)
    yield from (_extra(extra, names, find) for extra, names in extras.items())


def _extra(extra: str, names: list[str], find: Callable[[str], str]) -> Finding:
    gives = f" ({_GIVES[extra]})" if extra in _GIVES else ""
    if all(_version(name, find) is not None for name in names):
        return Finding(OK, f"extra {extra} is installed ({', '.join(names)}){gives}")
    return Finding(NOTE, f"extra {extra} is not installed{gives}", f"pip install 'fewstep[{extra}]' if you want it")


def _version(name: str, find: Callable[[str], str]) -> str | None:
    try:
        return find(name)
    except PackageNotFoundError:
        return None


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding(
            OK, "torchvision is not installed: FLUX.2-dev, Qwen-Image-2.1 and Anima need it, and no other model"
        )
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch fails in many ways
        why = short_error(error)
        return Finding(PROBLEM, f"this torchvision breaks diffusers: {why}", "pip uninstall torchvision")
    return Finding(OK, "torchvision is installed and fits this torch")


def _hub_cache() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    folder = Path(HF_HUB_CACHE)
    place = next(place for place in (folder, *folder.parents) if place.is_dir())
    if not os.access(place, os.W_OK):
        return Finding(NOTE, f"the Hugging Face cache {folder} is not writable", "set HF_HOME to a folder of yours")
    offline = "; HF_HUB_OFFLINE is set, so nothing is downloaded" if HF_HUB_OFFLINE else ""
    return Finding(OK, f"models from the Hugging Face Hub are kept in {folder}{offline}")


# ---------------------------------------------------------------- numbers


def _numbers(device: str) -> Finding:
    """One LoRA step of scenes-64 in float32 on ``device``, compared with the same step in float64 on the CPU."""
    try:
        exact, _ = lora_step("cpu", "fp64")
        computed, seconds = lora_step(device, "fp32")
    except Exception as error:  # whatever it is, the user should learn of it here and not in the middle of a run
        return Finding(PROBLEM, f"scenes-64 does not run on {device}: {short_error(error)}", "see the lines above")
    off = difference(computed, exact)
    text = f"scenes-64 on {device}: a LoRA step of 4 images takes {1000 * seconds:.0f} ms"
    if not off < _TOLERANCE:  # NaN is a problem too
        return Finding(PROBLEM, f"{text}, but its numbers are {off:.1%} off float64's", "update or reinstall torch")
    return Finding(OK, f"{text}; its numbers agree with float64 within {max(off, 1e-7):.0e}")


def difference(computed: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest distance of two tensors of one name, relative to the exact one's norm."""
    return max(float((computed[name].cpu().double() - exact[name]).norm() / exact[name].norm()) for name in exact)


def lora_step(device: str, precision: str) -> tuple[dict[str, Tensor], float]:
    """Loss, the teacher's solver step x_u and the gradient of one TCD step of the shipped model, on fixed numbers.

    Returns:
        the tensors by name, and the seconds of the faster of two such steps.
    """
    settings = TrainingSettings(batch_size=4, precision=precision, device=device)  # type: ignore[arg-type]
    teacher = load_teacher("scenes-64")
    prompts = teacher.encode_prompts(["a red circle", "two shapes", "a blue star", "a striped square"])
    denoiser, method = teacher.denoiser, TCD(teacher.denoiser.schedule, guidance_scale=3.0)
    denoiser.network.to(device, settings.dtype)  # type: ignore[attr-defined]
    rng = Rng(0, 0, settings.batch_size)  # float32 on the CPU: the same numbers for all
    x0 = rng.sample.normal("x0", teacher.latent_shape)
    draws = method.draw(Batch(x0), rng, Progress(0, 1))
    draws.noise = draws.noise.to(device, settings.dtype)
    batch = Batch(x0.to(device, settings.dtype), prompts.to(device, settings.dtype))
    roles = build_roles(denoiser, method, settings, Weights("lora", rank=4))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        ((player, loss),) = losses(method, roles, batch, draws, {"student"})
        gradient = torch.autograd.grad(loss.total, trained_by(player, roles), allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradient if g is not None]).cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    x_u = method.prepare(roles, batch, draws, {"student"}).x_u
    return {"loss": loss.total.detach(), "teacher": x_u, "gradient": flat}, min(seconds)
