"""Several processes that train as one: each takes its rows of every batch, gradients are averaged in one message.

torchrun or srun starts them. In a single process every function here does nothing and costs nothing.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.training import launch
from fewstep.training.progress import doing

MINUTES = 10.0
"""For how long a process waits for the others within a training step."""
_PATIENCE = timedelta(hours=12)  # the first process may encode a whole data set while the others wait
_SEEN_WITHIN = 60.0  # seconds: network file systems remember for that long that a file was not there
_SOON = 5.0  # seconds of waiting after which a machine without a display prints a line
_OF_GLOO = re.compile(r"\[[^][]*gloo/[^][]*:\d+\]")
"""The line of gloo's source with which its errors, plain RuntimeErrors, begin."""
_GROUPS: dict[str, Any] = {}  # beside the default group: of host numbers, and of waits for a process that works alone


class Lost(RuntimeError):
    """Another process has ended, or does not answer."""


def join(device: str = "cpu", folder: Path | None = None, minutes: float = MINUTES) -> None:
    """Join the processes that torchrun or srun started; do nothing in a single one.

    Args:
        device: what they train on; on "cuda" each takes the GPU of its own local rank.
        folder: where the first of them writes and the others read.
        minutes: how long one waits for another in a training step. Waits for work that the first does alone, such as
            encoding a data set, last up to twelve hours.

    Raises:
        ValueError: one sentence: the launcher's variables do not say which process this is, the device is one GPU for
            all, a machine has fewer GPUs than processes, the first host is unknown, or not all see ``folder``.
        Lost: the others did not come.
    """
    launch.check()
    here = launch.place()
    if here.count == 1:
        return
    gpu = _own_gpu(device, here)
    if not dist.is_initialized():
        _meet(gpu, timedelta(minutes=minutes))
    if folder is not None:
        check_shared(folder, here.by)


def _own_gpu(device: str, here: launch.Place) -> int | None:
    """The number of this process's GPU; None on other devices."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None
    if number:
        raise ValueError(
            f"The device {device} would put all {here.count} processes on one GPU: set it to cuda, and each takes the "
            "GPU of its own local rank."
        )
    there = torch.cuda.device_count()
    if there == 1 and here.by == "srun":  # --gpus-per-task shows each process its own alone
        return 0
    if here.local_rank >= there:
        raise ValueError(
            f"This machine has {there} GPUs and more processes than that: start as many processes on it as it has GPUs."
        )
    return here.local_rank


def _meet(gpu: int | None, timeout: timedelta) -> None:
    """Make the process groups."""
    # Its functions take the group of that moment as their default and keep it alive: imported later, as optimisers do,
    # it would leave gloo's threads running while Python ends, and now and then one of them aborts the process.
    import torch.distributed.nn.functional

    launch.prepare_rendezvous()
    _check_known(os.environ.get("MASTER_ADDR", ""))
    # before the rendezvous, which waits for ever for a process that was killed
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        with _ended_by_signals(), _waiting():
            dist.init_process_group("gloo" if gpu is None else "nccl", timeout=timeout)
            if gpu is not None:
                _GROUPS["host"] = dist.new_group(backend="gloo", timeout=timeout)
            _GROUPS["patient"] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except dist.DistError as error:
        count, where = os.environ.get("WORLD_SIZE"), os.environ.get("MASTER_ADDR")
        raise Lost(f"Not all of {count} processes came together at {where}: {_first_line(error)}") from None
    atexit.register(leave)
    if gpu is not None:
        _check_apart(str(torch.cuda.get_device_properties(gpu).uuid))


@contextmanager
def _waiting() -> Iterator[None]:
    """Within this block the user can see what the command waits for, and where; on the other machines too."""
    here, env = launch.place(), os.environ
    label = f"waiting for the other processes at {env.get('MASTER_ADDR', '')}:{env.get('MASTER_PORT', '')}"
    line = threading.Timer(_SOON, print, (f"process {here.rank}: {label}",), {"file": sys.stderr, "flush": True})
    line.daemon = True
    if here.rank > 0 and here.local_rank == 0:  # the first process of all has a display, see `progress.command`
        line.start()
    try:
        with doing(label):
            yield
    finally:
        line.cancel()


def _check_known(host: str) -> None:
    """Raises ValueError, one sentence, where a host's name stays unknown here; PyTorch would ask for it without end."""
    until = time.monotonic() + _SEEN_WITHIN  # a container's name may become known after the container has started
    while host:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"The processes are to meet on {host}, which is not known here ({error.strerror}): set MASTER_ADDR "
                    "to the address of the first machine."
                ) from None
        time.sleep(0.5)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within this block Ctrl-C and SIGTERM end the process at once: Python's handlers run only after the rendezvous."""
    mine = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: handler for number in mine if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_apart(gpu: str) -> None:
    """Raises ValueError, one sentence, in every process, where two of them have one GPU."""
    gpus = everywhere((gpu, socket.gethostname()))
    twice = next((host for number, (gpu, host) in enumerate(gpus) if (gpu, host) in gpus[:number]), None)
    if twice is not None:
        raise ValueError(f"Two processes on {twice} have the same GPU: start as many processes on it as it has GPUs.")


def check_shared(folder: Path, by: str = "") -> None:
    """See that all processes, started by ``by``, see the folder in which the first one writes. Nothing stays there.

    Raises:
        ValueError: one sentence, in every process, when one does not.
    """
    if count() == 1:
        return
    me, path = f"process {rank()} on {socket.gethostname()}", folder.absolute()
    above = next(parent for parent in (path, *path.parents) if parent.is_dir())
    probe = above / f".fewstep-{secrets.token_hex(8)}"
    if first():
        with suppress(OSError):  # where nothing can be written, the run itself says so
            probe.touch()
    below, name, owner, there = from_first((path.relative_to(above).parts, probe.name, me, probe.exists()))
    if not there:
        return
    mine = path.parents[len(below) - 1] if below else path
    seen = path.parts[len(mine.parts) :] == below and _appears(mine / name)
    blind = everywhere("" if seen else me)
    if first():
        probe.unlink(missing_ok=True)
    if any(blind):
        apart = ", or unset SLURM_STEP_NODELIST where these are runs of their own" if by == "srun" else ""
        raise ValueError(
            f"{folder} is not the same folder for {owner} and for {next(filter(None, blind))}: give a folder on a file "
            f"system that all machines share, by its whole path{apart}."
        )


def _appears(path: Path) -> bool:
    """Whether a file of another machine is to be seen here, soon."""
    until = time.monotonic() + _SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(path.parent)  # makes network file systems look again
    return True


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of a communication which another process has left, or which it did not enter in time.

    NCCL's refusal of how the processes were started, such as two of them on one GPU, is not: it would come again.
    """
    if isinstance(error, dist.DistError):
        return not any(words in str(error) for words in ("invalid usage", "Duplicate GPU"))
    return isinstance(error, Lost) or (count() > 1 and _OF_GLOO.search(str(error)) is not None)


def loss(error: BaseException) -> str:
    """An error that `is_lost` in a sentence, with what the library of the communication says of it."""
    if isinstance(error, Lost):
        return str(error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = ": ".join(line.strip().rstrip(".:") for line in dict.fromkeys((lines[0], lines[-1])))
    return f"Another process of this run has ended or hangs ({said:.500})."


def _first_line(error: BaseException) -> str:
    return f"{str(error).partition(chr(10))[0].rstrip('.')}."


def leave() -> None:
    """Leave the other processes and end the communication threads; do nothing in a single process."""
    _GROUPS.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _die_with(parent: int) -> None:
    """End this process soon after torchrun: an orphan would go on writing into a folder that another run may use."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def rank() -> int:
    """Rank of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rows(batch_size: int) -> slice:
    """This process's part of a batch.

    Raises:
        ValueError: when the batch cannot be split evenly.
    """
    if batch_size % count():
        raise ValueError(f"A batch of {batch_size} cannot be split evenly over {count()} processes.")
    each = batch_size // count()
    return slice(rank() * each, (rank() + 1) * each)


def wait() -> None:
    """Wait until every process has come here, however long one of them works alone."""
    if count() > 1:
        dist.barrier(group=_GROUPS.get("patient"))


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs this block; then the others run it and find its files."""
    if not first():
        wait()
    yield
    if first():
        wait()


def agree(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is True in any process; waits for all processes, not for their devices."""
    if count() == 1:
        return flags
    found = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_GROUPS.get("host"))
    return tuple(map(bool, found.tolist()))


def from_first(value: Any) -> Any:
    """The first process's ``value``, in every process."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_GROUPS.get("patient"))
    return values[0]


def everywhere(value: Any) -> list[Any]:
    """The values of all processes, in every one of them."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value, group=_GROUPS.get("patient"))
    return values


def means(values: Mapping[str, float]) -> dict[str, float]:
    """Means over processes of host numbers; all must give the same names."""
    if count() == 1 or not values:
        return dict(values)
    numbers = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(numbers, group=_GROUPS.get("host"))
    return dict(zip(values, (numbers / count()).tolist(), strict=True))


def total(value: Tensor) -> Tensor:
    """Sum over processes of a tensor on their device."""
    if count() == 1:
        return value
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, by one flat all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if count() == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= count()
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
