"""The planted defects, room by room: (what is wrong, the code, the defect, the test that must fail)."""

from importlib import import_module
from pkgutil import walk_packages

from tests import mutants
from tests.mutants.mutant import Mutant

NO_ROOMS = {f"tests.mutants.{name}" for name in ("__main__", "catalogue", "child", "mutant")}
ROOMS = [import_module(m.name) for m in walk_packages(mutants.__path__, "tests.mutants.") if m.name not in NO_ROOMS]
CATALOGUE: list[Mutant] = [mutant for room in ROOMS for mutant in getattr(room, "MUTANTS", ())]
