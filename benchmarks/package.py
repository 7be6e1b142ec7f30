"""Does the package work where it is installed? Wheel and source distribution, in environments of their own.

The wheel and the source distribution are built and checked by twine. The wheel is installed into a fresh environment
with its declared dependencies alone, and runs there; the source distribution is installed from its archive, and passes
some of its own tests. Other Pythons (``--python``) resolve the dependencies, compile every file and import the package
without torch. ``--oldest`` installs the lowest versions that pyproject.toml allows, and runs tests with them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = "import fewstep; [getattr(fewstep, name) for name in fewstep.__all__]; print(len(fewstep.__all__))"
COMMANDS = (
    ["fewstep", "--version"],
    ["fewstep", "demo", "--help"],
    ["fewstep", "sample", "scenes-64", "-p", "a red star", "-p", "two large striped hearts"],
    ["fewstep", "doctor"],
    ["python", "-W", "error", "-c", NAMES],
)
OWN_TESTS = ["tests/program/test_package.py", "tests/program/test_portable.py", "tests/diffusion/test_schedule.py"]
OLD_TESTS = [
    "tests/models/test_families.py", "tests/models/test_single_file.py", "tests/sampling/test_parity.py",
    "tests/export/test_layouts.py", "tests/checkpoints/test_load.py", "tests/runs/test_distill.py",
]  # fmt: skip
PYTEST = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not needs"]


class Environment:
    """A virtual environment; its commands see neither this process's packages nor its source tree."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        subprocess.run([python, "-m", "venv", folder], check=True)

    def run(self, *words: str | Path, cwd: Path) -> str:
        """What a command prints; its last lines and exit code 1 if it fails."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.bin / words[0]), *map(str, words[1:])]
        done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-25:]))
        return done.stdout

    def timed(self, *words: str | Path, cwd: Path) -> float:
        begun = time.perf_counter()
        self.run(*words, cwd=cwd)
        return round(time.perf_counter() - begun, 1)

    def install(self, *words: str | Path, cwd: Path) -> float:
        return self.timed("python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *words, cwd=cwd)


def build(place: Path, out: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Wheel and source distribution in ``out``, checked by twine; their sizes in bytes, the seconds of both."""
    tools = Environment(place / "tools")
    tools.run("python", "-m", "pip", "install", "-q", "build", "twine", cwd=place)
    seconds = tools.timed("python", "-m", "build", "-o", out, ROOT, cwd=place)
    version = json.loads(tools.run("python", "-c", _VERSION, cwd=ROOT))
    wheel, sdist = out / f"fewstep-{version}-py3-none-any.whl", out / f"fewstep-{version}.tar.gz"
    tools.run("twine", "check", "--strict", wheel, sdist, cwd=place)
    return wheel, sdist, {"wheel": wheel.stat().st_size, "sdist": sdist.stat().st_size, "build": seconds}


_VERSION = "import json, tomllib; print(json.dumps(tomllib.load(open('pyproject.toml', 'rb'))['project']['version']))"


def installed(place: Path, wheel: Path, sdist: Path) -> dict[str, float]:
    """Seconds of the installation, of each command, and of the source distribution's own tests."""
    fresh, empty = Environment(place / "fresh"), place / "empty"
    empty.mkdir()
    found = {"install": fresh.install(wheel, cwd=empty)}
    found |= {" ".join(words[:4])[:40]: fresh.timed(*words, cwd=empty) for words in COMMANDS}
    fresh.install("--no-deps", "--force-reinstall", sdist, cwd=empty)
    fresh.install("pytest", "hypothesis", "scipy", "setuptools", cwd=empty)
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    unpacked = place / sdist.name.removesuffix(".tar.gz")
    return found | {"the source distribution's tests": fresh.timed(*PYTEST, *OWN_TESTS, cwd=unpacked)}


def elsewhere(place: Path, wheel: Path, python: str) -> str:
    """Another Python: dependencies resolve, every file compiles, the package is imported without any of them."""
    other = Environment(place / f"other-{Path(python).name}", python)
    other.run("python", "-m", "pip", "install", "-q", "--dry-run", wheel, cwd=place)
    other.run("python", "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=place)
    site = other.run("python", "-c", "import fewstep; print(fewstep.__path__[0])", cwd=place).strip()
    other.run("python", "-W", "error", "-m", "compileall", "-f", "-q", site, cwd=place)
    shown = "import sys, fewstep; assert fewstep.__all__ and fewstep.__version__; print(sys.version.split()[0])"
    return other.run("python", "-W", "error", "-c", shown, cwd=place).strip()


def oldest(place: Path, wheel: Path) -> dict[str, str]:
    """The lowest versions that pyproject.toml allows together, after tests have passed with them."""
    old = Environment(place / "old")
    old.run("python", "-m", "pip", "install", "-q", "uv", cwd=place)
    lowest = ["--resolution", "lowest-direct"]
    old.run("uv", "pip", "compile", *lowest, ROOT / "pyproject.toml", "-o", place / "oldest.txt", cwd=place)
    needed = ["-r", place / "oldest.txt", "pytest", "hypothesis", "scipy"]
    old.run("uv", "pip", "install", "--python", old.bin / "python", *needed, cwd=place)
    old.run("python", "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=place)
    old.run(*PYTEST, *OLD_TESTS, cwd=ROOT)
    listed = json.loads(old.run("python", "-m", "pip", "list", "--format", "json", cwd=place))
    names = old.run("python", "-c", _DIRECT, cwd=place).split()
    return {entry["name"]: entry["version"] for entry in listed if entry["name"].replace("-", "_") in names}


_DIRECT = """
import re
from importlib.metadata import requires
print(*(re.match(r"[\\w.-]+", line)[0].replace("-", "_") for line in requires("fewstep") if "extra ==" not in line))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of wheel and source distribution")
    parser.add_argument("--python", action="append", default=[], help="another Python to try, e.g. python3.13")
    parser.add_argument("--oldest", action="store_true", help="test the oldest dependencies (downloads 3 GB)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fewstep-package-") as name:
        wheel, sdist, found = build(Path(name), asked.out.resolve())
        found["seconds"] = installed(Path(name), wheel, sdist)
        found["pythons"] = [elsewhere(Path(name), wheel, python) for python in asked.python]
        if asked.oldest:
            found["oldest"] = oldest(Path(name), wheel)
    print(json.dumps(found))
    sizes = f"the wheel has {found['wheel'] / 1e6:.1f} MB, the source distribution {found['sdist'] / 1e6:.1f} MB"
    print(f"Both are whole: {sizes}; installed, the wheel runs {len(COMMANDS)} commands, sdist passes its tests.")


if __name__ == "__main__":
    main()
