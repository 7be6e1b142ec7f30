"""Start several processes that train as one, as torchrun would."""

import os
import socket

import torch
import torch.multiprocessing as processes

from fewstep.training import distributed


def spawn(function, *arguments, count=2):
    """Call ``function(*arguments)`` in ``count`` processes that know each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(_enter, (count, port, function, arguments), nprocs=count)


def _enter(rank, count, port, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.join()
    function(*arguments)
    distributed.leave()
