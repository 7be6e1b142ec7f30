"""Which of several processes this is, as torchrun or srun says it in environment variables. No PyTorch is imported."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass


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
    """This process's place.

    srun's variables count where torchrun's are not set. A batch script has SLURM's variables of its job, but none of a
    step: what runs in it without srun is a single process.
    """
    env = os.environ
    if "WORLD_SIZE" in env:
        rank, count, local = (int(env.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Place(rank, count, local, "torchrun")
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        count = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1"))
        return Place(int(env["SLURM_PROCID"]), count, int(env.get("SLURM_LOCALID", "0")), "srun")
    return Place()


def prepare_rendezvous() -> None:
    """Give PyTorch the variables by which the processes of srun find each other; torchrun sets them itself.

    The first process listens on the first machine of the step, at ``MASTER_PORT`` or a port made of the job's number.
    """
    here = place()
    if here.by != "srun":
        return
    job, step = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    own = {"RANK": here.rank, "WORLD_SIZE": here.count, "LOCAL_RANK": here.local_rank}
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
    if here.count > 1 and int(env.get("GROUP_WORLD_SIZE", "1")) > 1:
        return f"torchrun (its options as before) -m {shlex.join(['fewstep', *said])} on every machine"
    if here.count > 1 and "LOCAL_WORLD_SIZE" in env:
        return shlex.join(["torchrun", "--nproc-per-node", env["LOCAL_WORLD_SIZE"], "-m", "fewstep", *said])
    return shlex.join(["fewstep", *said])
