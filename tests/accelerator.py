"""A pretended Apple GPU, device ``apple``: values are computed on the CPU, under the rules of such a device.

torch without Metal has no tensors on ``mps``; a backend written in Python takes its place. Each of its tensors is a
wrapper around a CPU tensor, and every operator is run on the values within. As on the real device, float64 does not
exist there, operators take no tensors of another device (but for single numbers), and numpy sees none of its tensors.
What it does not show: operators that Metal lacks, and Metal's own rounding. The backend is torch's for the rest of the
process, so tests use it in one of their own.
"""

from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch asks `torch.mps` for; its random numbers are the CPU's."""

    def get_rng_state(self, device="apple"):
        return torch.get_rng_state()

    def set_rng_state(self, state, device="apple"):
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("apple", Backend())
APPLE = torch.device("apple", 0)
LACKING = (torch.float64, torch.complex128)
MOVES = {"_to_copy", "copy_", "copy", "_copy_from_and_resize", "set_"}
TAKES_HOST_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; ``value`` is what it holds, on the CPU."""

    @staticmethod
    def __new__(cls, value):
        if value.dtype in LACKING:
            raise TypeError(f"An Apple GPU has no {value.dtype}.")
        return torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(),
            dtype=value.dtype, layout=value.layout, device=APPLE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        return self.value.tolist()

    def numpy(self, **how):
        raise TypeError("can't convert apple:0 device type tensor to numpy: use Tensor.cpu() first.")

    def __repr__(self):
        return f"OnDevice({self.value})"


def _value(item):
    return item.value if isinstance(item, OnDevice) else item


def _run(func, args, kwargs):
    """One operator: inputs are checked, values are computed on the CPU, what it makes is on the device again."""
    name = func._schema.name.removeprefix("aten::")
    given = kwargs.get("device")
    asked = None if given is None else torch.device(given).type
    there = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    hosts = [item for item in there if not isinstance(item, OnDevice) and item.ndim > 0]
    if any(isinstance(item, OnDevice) for item in there) and hosts and name not in MOVES | TAKES_HOST_INDICES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found apple and cpu.")
    plain = {key: "cpu" if key == "device" and item is not None else item for key, item in kwargs.items()}
    made = func(*pytree.tree_map(_value, args), **pytree.tree_map(_value, plain))
    if asked == "cpu" or name in ("_local_scalar_dense", "equal", "is_same_size"):
        return made
    if name == "copy_" and not isinstance(args[0], OnDevice):  # a copy to the host
        return args[0]
    wrapped = pytree.tree_map(lambda item: OnDevice(item) if isinstance(item, torch.Tensor) else item, made)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Mode(TorchDispatchMode):
    """Makes tensors of factories, and of moves from the host, on the pretended device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "apple":
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def pretended():
    """Within this block tensors can be made on, and moved to, the pretended device."""
    with _Mode():
        yield APPLE
