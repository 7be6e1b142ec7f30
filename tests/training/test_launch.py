"""Which of several processes this is: the variables of torchrun and srun, and the command that starts them again."""

import os
import signal
import socket
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from fewstep.training import distributed, launch
from fewstep.training.distributed import join
from fewstep.training.launch import Place, command, first_host, place

STEP = {
    "SLURM_JOB_ID": "4100042", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip
BATCH = {name: STEP[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}


@pytest.fixture
def started(monkeypatch):
    """A function that sets the variables of a launcher, and no others of any."""

    def start(variables):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"):
                monkeypatch.delenv(name)
        monkeypatch.setattr(os, "environ", dict(os.environ) | variables)

    return start


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 4, 1, "torchrun")),
        (STEP, Place(5, 8, 1, "srun")),
        (STEP | TORCHRUN, Place(3, 4, 1, "torchrun")),  # one torchrun a machine, started by srun
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"}, Place(5, 16, 1, "srun")),
        (STEP | {"WORLD_SIZE": "8", "MASTER_ADDR": "gpu07"}, Place(5, 8, 1, "srun")),  # set in the batch script
        (STEP | {"WORLD_SIZE": "8", "RANK": "0"}, Place(5, 8, 1, "srun")),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, 0, "torchrun")),  # one process a container
        ({"WORLD_SIZE": "4"}, Place()),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, Place()),
        (TORCHRUN | {"RANK": "first"}, Place()),
        (STEP | {"SLURM_PROCID": "", "SLURM_LOCALID": "?"}, Place(0, 8, 0, "srun")),
        (BATCH, Place()),  # in a batch script without srun: one process, whatever the job may start
    ],
)
def test_which_process_this_is(started, variables, expected):
    started(variables)
    assert place() == expected


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "4"}, "The environment variable WORLD_SIZE is 4, but RANK is not set: start"),
        ({"WORLD_SIZE": "four"}, "The environment variable WORLD_SIZE must be a whole number, not 'four': start"),
        (TORCHRUN | {"RANK": "-1"}, "The environment variable RANK must be a whole number, not '-1': start"),
        (TORCHRUN | {"RANK": "4"}, "This is process 4 of 4 by its environment variables: start"),
        (STEP | {"SLURM_PROCID": "x"}, "The environment variable SLURM_PROCID must be a whole number, not 'x': start"),
    ],
)
def test_variables_that_do_not_say_which_process_this_is_are_refused(started, variables, sentence):
    started(variables)
    with pytest.raises(ValueError, match=rf"^{sentence} several processes by torchrun or srun"):
        join()


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"RANK": "gold"}, BATCH])
def test_a_single_process_joins_none(started, variables):
    started(variables)
    join()
    assert distributed.count() == 1


@pytest.mark.parametrize("by", ["srun", "torchrun"])
def test_runs_of_their_own_in_one_step_learn_how_to_stay_apart(monkeypatch, tmp_path, by):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "everywhere", lambda value: [value, "process 1 on b"])
    monkeypatch.setattr(distributed, "from_first", lambda value: value)
    with pytest.raises(ValueError, match=r"is not the same folder for process 0 on .* and for process 1 on b") as error:
        distributed.check_shared(tmp_path / "run", by)
    assert ("unset SLURM_STEP_NODELIST where these are runs of their own" in str(error.value)) == (by == "srun")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"), ("node3,node1", "node3"), ("node[01-04,07],gpu3", "node01"), ("a[9,11-12]-ib", "a9-ib"),
        ("rack[0-1]node[2-3]", "rack0node2"), ("login,node[1-2]", "login"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_processes_of_srun_find_each_other(started):
    started(STEP)
    launch.prepare_rendezvous()
    mine = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert mine == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert 15_000 <= int(os.environ["MASTER_PORT"]) < 30_000
    ports = set()
    for step in ("0", "1", "2"):
        started(STEP | {"SLURM_STEP_ID": step})
        launch.prepare_rendezvous()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 3  # steps of one job may run at once
    started(STEP | {"MASTER_PORT": "555", "MASTER_ADDR": "10.0.0.1"})
    launch.prepare_rendezvous()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "555")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "fewstep distill 'a b'"),
        (STEP, "srun --ntasks 8 fewstep distill 'a b'"),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "torchrun --nproc-per-node 2 -m fewstep distill 'a b'"),
        (TORCHRUN, "torchrun (its options as before) -m fewstep distill 'a b' on every machine"),
    ],
)
def test_the_command_that_continues_is_that_of_the_launcher(started, variables, expected):
    started(variables)
    assert command(["distill", "a b"]) == expected


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_one_gpu_for_all_processes_is_refused(started, device):
    started(TORCHRUN)
    with pytest.raises(ValueError, match=rf"^The device {device} would put all 4 processes on one GPU: set it to cuda"):
        join(device)


def test_each_process_has_a_gpu_of_its_own(started, monkeypatch):
    from fewstep.training.distributed import _own_gpu

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [_own_gpu("cuda", Place(4 + local, 8, local, "torchrun")) for local in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"^This machine has 2 GPUs and more processes than that"):
        _own_gpu("cuda", Place(6, 8, 2, "torchrun"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert _own_gpu("cuda", Place(3, 8, 3, "srun")) == 0  # srun shows each process its own alone
    assert _own_gpu("cpu", Place(3, 8, 3, "torchrun")) is None


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:1275, unhandled system error\nLast error:\nsocket: no route to host.\n"
TWICE = "NCCL error in: x.cpp:1, invalid usage\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (distributed.Lost("Nobody came."), True),
        (RuntimeError(GLOO), True),
        (
            RuntimeError("Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no"),
            True,
        ),
        (dist.DistBackendError(NCCL), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (dist.DistBackendError(TWICE), False),
        (RuntimeError("Error opening /data/igloo/x.png"), False),
        (RuntimeError("[Errno 5] read of /data/gloo/x.png failed: [1:2]"), False),
    ],
)
def test_only_a_communications_own_errors_are_a_lost_process(monkeypatch, error, is_lost):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert distributed.is_lost(error) == is_lost
    monkeypatch.setattr(distributed, "count", lambda: 1)
    assert distributed.is_lost(error) == (is_lost and type(error) is not RuntimeError)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (distributed.Lost("Nobody came."), "Nobody came."),
        (RuntimeError(GLOO), f"Another process of this run has ended or hangs ({GLOO})."),
        (
            dist.DistBackendError(NCCL),
            "Another process of this run has ended or hangs (NCCL error in: ProcessGroupNCCL.cpp:1275, unhandled "
            "system error: socket: no route to host).",
        ),
        (dist.DistError(), "Another process of this run has ended or hangs (DistError)."),
    ],
)
def test_a_lost_process_is_said_with_what_the_library_says(error, sentence):
    assert distributed.loss(error) == sentence


def test_a_first_host_that_is_not_known_is_a_sentence(started, monkeypatch):
    asked = []

    def unknown(host, port):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    started(STEP)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(distributed, "_SEEN_WITHIN", -1.0)
    with pytest.raises(ValueError, match=r"^The processes are to meet on gpu07, which is not known here \(Name .*"):
        join()
    assert asked == ["gpu07"]


def test_a_start_that_waits_can_be_stopped(started, monkeypatch):
    """Python's handlers of signals do not run in PyTorch's rendezvous."""
    both = signal.SIGINT, signal.SIGTERM
    within = []

    def nobody(*_, **__):
        within.extend(map(signal.getsignal, both))
        raise dist.DistNetworkError("nobody")

    started(TORCHRUN)
    monkeypatch.setattr(dist, "init_process_group", nobody)
    monkeypatch.setattr(distributed, "_die_with", lambda parent: None)
    usual = [signal.signal(number, signal.default_int_handler) for number in both]
    try:
        with pytest.raises(distributed.Lost):
            join()
        assert within == [signal.SIG_DFL] * 2
        assert [signal.getsignal(number) for number in both] == [signal.default_int_handler] * 2
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # started by nohup
        with pytest.raises(distributed.Lost):
            join()
        assert within[2:] == [signal.SIG_IGN, signal.SIG_DFL] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in zip(both, usual, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(("place", "said"), [
    ({"RANK": "0", "LOCAL_RANK": "0"}, [("doing", "waiting for the other processes at 10.0.0.1:29500")]),
    ({"RANK": "8", "LOCAL_RANK": "0"}, [("doing", "waiting for the other processes at 10.0.0.1:29500"),
                                        ("stderr", "process 8: waiting for the other processes at 10.0.0.1:29500")]),
    ({"RANK": "9", "LOCAL_RANK": "1"}, [("doing", "waiting for the other processes at 10.0.0.1:29500")]),
])  # fmt: skip
def test_a_start_states_what_it_waits_for(started, monkeypatch, capsys, place, said):
    """In the display of the first process, and in a line of the first one on every other machine."""
    found = []

    @contextmanager
    def doing(label):
        found.append(("doing", label))
        yield

    def nobody(*_, **__):
        time.sleep(0.15)
        raise dist.DistNetworkError("nobody")

    started(TORCHRUN | {"WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"} | place)
    monkeypatch.setattr(dist, "init_process_group", nobody)
    monkeypatch.setattr(distributed, "_die_with", lambda parent: None)
    monkeypatch.setattr(distributed, "_SOON", 0.02)
    monkeypatch.setattr(distributed, "doing", doing)
    with pytest.raises(distributed.Lost):
        join()
    assert found + [("stderr", line) for line in capsys.readouterr().err.splitlines()] == said


def test_two_processes_with_one_gpu_are_refused(monkeypatch):
    for others, refused in {("b", "a"): True, ("b", "c"): False}.items():
        cards = [(uuid, socket.gethostname()) for uuid in ("a", *others)]
        monkeypatch.setattr(distributed, "everywhere", lambda mine, cards=cards: [mine, *cards[1:]])
        if refused:
            with pytest.raises(ValueError, match=r"^Two processes on .* have the same GPU: start as many "):
                distributed._check_apart("a")
        else:
            distributed._check_apart("a")
