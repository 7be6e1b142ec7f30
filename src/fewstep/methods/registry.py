"""Methods by the names users type; a local file's class is named ``./mine.py:Mine``."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path

from fewstep.methods.base import Method
from fewstep.methods.cm import CM
from fewstep.methods.ctm import CTM
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.feedback import Feedback
from fewstep.methods.flowmap import FlowMap
from fewstep.methods.hyper import Hyper
from fewstep.methods.ladd import LADD
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.pcm import PCM
from fewstep.methods.pdd import PDD
from fewstep.methods.reflow import Reflow
from fewstep.methods.scm import SCM
from fewstep.methods.tcd import TCD
from fewstep.methods.turbo import Turbo

_ALL = (CM, LCM, CTM, TCD, PCM, DMD, DMD2, Turbo, LADD, Lightning, Hyper, FlowMap, PDD, Reflow, SCM, Feedback)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _ALL}


def find_method(name: str) -> type[Method]:
    """The method class of that name, or of ``path/to/file.py:Class``.

    Raises:
        ValueError: one sentence that names the nearest known method, or what is wrong with the file.
    """
    if ":" in name or name.endswith(".py"):
        return _from_file(name)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"Unknown method '{name}': known are {', '.join(METHODS)}.{hint}")
    return METHODS[name]


def _from_file(spec: str) -> type[Method]:
    path, _, attribute = spec.rpartition(":")
    if not path or not attribute:
        raise ValueError(f"A local method is named FILE.py:Class, not '{spec}'.")
    if not Path(path).is_file():
        raise ValueError(f"There is no method file {path}.")
    module_name = f"fewstep_local_{Path(path).stem}"
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"The method file {path} does not run: {type(error).__name__}: {error}") from error
    cls = getattr(module, attribute, None)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"{path} has no Method named '{attribute}'.")
    return cls
