"""Which of several processes this is, as torchrun or srun says it in environment variables. No PyTorch is imported."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

_TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK"
_SRUN = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that were started together.

    Attributes:
        rank, count: its number among all, and how many there are.
        local_rank: its number on this machine.
        by: the program that started them: "torchrun", "srun", or "" for a single process.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    by: str = ""


def place() -> Place:
    """This process's place. What is empty or no number counts as not set here; `check` refuses it.

    srun's variables count where torchrun's are not all set: a batch script may set ``WORLD_SIZE`` for its steps. It has
    SLURM's variables of its job, but none of a step: what runs in it without srun is a single process.
    """
    env = os.environ
    in_step = "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env
    rank, count, local = map(_number, _TORCHRUN)
    if rank is not None and count is not None and (local is not None or not in_step):
        return Place(rank, count, local or 0, "torchrun")
    if in_step:
        count = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1
        return Place(_number("SLURM_PROCID") or 0, count, _number("SLURM_LOCALID") or 0, "srun")
    return Place()


def check() -> None:
    """See that the variables say which process this is.

    Raises:
        ValueError: one sentence: one of them is no number, or says that there are several processes, but not which
            this is.
    """
    env, here = os.environ, place()
    names = _SRUN if here.by == "srun" else _TORCHRUN if env.get("WORLD_SIZE") else ()
    out = "start several processes by torchrun or srun"
    for name in names:
        if env.get(name) and _number(name) is None:
            raise ValueError(
                f"The environment variable {name} must be a whole number, not '{env[name]:.80}': {out}, or unset it."
            )
    if not here.by and (_number("WORLD_SIZE") or 1) > 1:
        size = env["WORLD_SIZE"]
        raise ValueError(f"The environment variable WORLD_SIZE is {size}, but RANK is not set: {out}, or unset it.")
    if here.rank >= here.count:
        raise ValueError(f"This is process {here.rank} of {here.count} by its environment variables: {out}.")


def _number(name: str) -> int | None:
    """The whole number in an environment variable; None where there is none."""
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdecimal() else None


def prepare_rendezvous() -> None:
    """Give PyTorch the variables by which the processes of srun find each other; torchrun sets them itself.

    The first process listens on the first machine of the step, at ``MASTER_PORT`` or a port made of the job's number.
    """
    here = place()
    if here.by != "srun":
        return
    job, step = (_number(name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    own = dict(zip(_TORCHRUN, (here.rank, here.count, here.local_rank), strict=True))
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(15_000 + (10 * job + step) % 15_000))
    os.environ |= {name: str(value) for name, value in own.items()}


def first_host(nodes: str) -> str:
    """The first host of SLURM's list: node01 of ``node[01-04,07],gpu3``."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).partition(",")[0]


def command(words: Sequence[object]) -> str:
    """The command line that starts ``fewstep`` with these words as it was started here, quoted for a shell."""
    env, here = os.environ, place()
    said = [str(word) for word in words]
    if here.count > 1 and here.by == "srun":
        return shlex.join(["srun", "--ntasks", str(here.count), "fewstep", *said])
    if here.count > 1 and (_number("GROUP_WORLD_SIZE") or 1) > 1:
        return f"torchrun (its options as before) -m {shlex.join(['fewstep', *said])} on every machine"
    if here.count > 1 and "LOCAL_WORLD_SIZE" in env:
        return shlex.join(["torchrun", "--nproc-per-node", env["LOCAL_WORLD_SIZE"], "-m", "fewstep", *said])
    return shlex.join(["fewstep", *said])
