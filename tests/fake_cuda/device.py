"""The pretended device, and what is counted of it."""

import sys
from collections import Counter
from functools import partial

import torch
import torch.cuda.amp.common
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "unique_consecutive"}
"""Operators whose result, or its shape, the host has to wait for."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


def pretend():
    """Let torch take "cuda" for a device that is there."""
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    for name in ("manual_seed", "manual_seed_all", "set_rng_state", "empty_cache"):
        setattr(torch.cuda, name, partial(_nothing, name))
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    torch.Tensor.pin_memory = lambda t, *args: t.clone()
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    torch._C._select_conv_backend = lambda *args, **kwargs: torch._C._ConvBackend.Cudnn
    torch.nn.Module._apply = _moved


def _nothing(name, *args, **kwargs):
    """In the place of functions of torch.cuda; each needs an object of its own, which torch's compiler looks up."""


def _moved(module, change, recurse=True):
    """`torch.nn.Module._apply`, with a new parameter where a real one cannot become a fake one in place."""
    for child in module.children() if recurse else ():
        _moved(child, change)
    for own in (module._parameters, module._buffers):
        for name, t in own.items():
            if t is None:
                continue
            with torch.no_grad():
                made = change(t)
            if made is not t:
                is_weight = isinstance(t, torch.nn.Parameter)
                own[name] = torch.nn.Parameter(made.detach(), t.requires_grad) if is_weight else made
    return module


class FakeCuda(TorchDispatchMode):
    """Within this block "cuda" is the pretended device.

    Attributes:
        seen: how often each (what, line) was asked for: copies, blocking copies, reads.
        operators: calls on the device.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.operators = Counter(), 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def clear(self):
        """Forget what was counted."""
        self.seen.clear()
        self.operators = 0

    @property
    def waits(self):
        """What the host has to wait for."""
        return {key: n for key, n in self.seen.items() if key[0] != "copy"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if isinstance(t, FakeTensor)]
        to = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not there and to != "cuda":
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != (to or "cuda"):
            raise RuntimeError(f"{name}: a generator of {generator.device} draws for cuda.")
        if there and name == "_local_scalar_dense":
            self._note("read")
            return True if there[0].dtype == torch.bool else 1.0 if there[0].is_floating_point() else 1
        copied = self._copied(name, args, kwargs, there, to)
        if copied is not None:
            return copied
        if name in READS or (name in INDEXED and any(t.dtype == torch.bool for t in tensors[1:])):
            self._note("read")
        if name in INDEXED and any(t.device.type == "cpu" for t in tensors[1:] if t.ndim):
            self._note("blocking copy")
        self.operators += 1
        with self._fake:
            return func(*args, **kwargs)

    def _copied(self, name, args, kwargs, there, to):
        """Note a copy between host and device; what it gives, where that is on the host."""
        if name == "_to_copy" and to is not None:
            kind = "copy" if kwargs.get("non_blocking") else "blocking copy"
            if there and to == "cpu":
                self._note("read")  # whatever it says, its values are looked at next
                return torch.zeros(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
            if not there and to == "cuda":
                self._note(kind)
        if name == "copy_" and isinstance(args[1], torch.Tensor) and args[0].device.type != args[1].device.type:
            if args[0].device.type == "cpu":
                self._note("read")
                return args[0]
            self._note("copy" if kwargs.get("non_blocking") or (len(args) > 2 and args[2]) else "blocking copy")
        return None

    def _note(self, what):
        frame, line = sys._getframe(2), ""
        while frame is not None and not line:
            _, mine, rest = frame.f_code.co_filename.partition("/src/fewstep/")
            line = f"{rest}:{frame.f_lineno}" if mine else ""
            frame = frame.f_back
        self.seen[what, line or "elsewhere"] += 1
