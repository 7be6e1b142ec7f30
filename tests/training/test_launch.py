"""Which of several processes this is: the variables of torchrun and srun, and the command that starts them again."""

import os

import pytest

from fewstep.training import launch
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
        (BATCH, Place()),  # in a batch script without srun: one process, whatever the job may start
    ],
)
def test_which_process_this_is(started, variables, expected):
    started(variables)
    assert place() == expected


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
