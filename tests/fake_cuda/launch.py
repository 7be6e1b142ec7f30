"""Starts a program with what a CUDA build of torch asks the driver for, compiled from the two files beside this one."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_STARTED = "FEWSTEP_FAKE_CUDA"


def missing():
    """What this machine lacks for it, in words; empty where nothing."""
    import torch

    if torch.version.cuda is None or sys.platform != "linux":
        return "this torch is no CUDA build for Linux"
    return next((f"there is no {program}" for program in ("gcc", "g++") if shutil.which(program) is None), "")


def start_again():
    """Start this program once more, in an environment with the compiled files; there it does nothing."""
    if os.environ.get(_STARTED):
        shutil.rmtree(os.environ.pop(_STARTED))  # loaded by now
        return
    folder = Path(tempfile.mkdtemp(prefix="fake-cuda-"))
    for compiler, source, made in (("gcc", "driver.c", "libcuda.so.1"), ("g++", "count.cpp", "count.so")):
        subprocess.run([compiler, "-shared", "-fPIC", HERE / source, "-ldl", "-o", folder / made], check=True)
    before = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ |= {
        _STARTED: str(folder), "LD_PRELOAD": str(folder / "count.so"), "LD_LIBRARY_PATH": f"{folder}:{before}"
    }  # fmt: skip
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
