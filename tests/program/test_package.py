"""The package: one version, links that hold on PyPI, declared dependencies, files that are not forgotten."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import fewstep
from tests.docs import test_docs
from tests.mutants.mutant import ROOT

KNOWN = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = KNOWN["project"]
SOURCES = sorted((ROOT / "src" / "fewstep").rglob("*.py"))
HOME = "https://example.org/someone/fewstep"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def package():
    """setup.py as a module: nothing is built when it is imported."""
    spec = importlib.util.spec_from_file_location("fewstep_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the version


def test_the_version_stands_in_pyproject_alone():
    assert fewstep.__version__ == PROJECT["version"]
    for name in ("CITATION.cff", "setup.py", "src/fewstep/__init__.py", "Makefile", *map(str, ROOT.glob("docker/*"))):
        assert PROJECT["version"] not in read(name), f"{name} states the version a second time"


# ---------------------------------------------------------------- the README on PyPI


def targets(markdown):
    """Every address that a renderer of CommonMark with tables makes a link or an image of, and raw HTML's."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    inline = [child for token in tokens for child in (token.children or [])]
    found = [str(t.attrGet("href") or t.attrGet("src")) for t in inline if t.type in ("link_open", "image")]
    raw = "".join(t.content for t in [*tokens, *inline] if t.type in ("html_block", "html_inline"))
    return found + re.findall(r"""\b(?:href|src|srcset)=["']([^"']*)""", raw)


def words(markdown):
    """The words that a reader sees, without images."""
    shown = ("text", "code_inline", "fence", "code_block")
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    blocks = [
        "".join(t.content if t.type in shown else "\n" * (t.type == "softbreak") for t in token.children or [token])
        for token in tokens
    ]
    return "\n".join(blocks).split()


def test_without_an_address_the_readme_has_no_dead_link_and_every_word(package):
    text = package.page(read("README.md"), "", "1.2.3")
    assert len(targets(read("README.md"))) > 30  # there is something to do
    assert [t for t in targets(text) if not t.startswith(("https://", "http://"))] == []
    assert words(text) == words(read("README.md"))


def test_with_an_address_every_link_of_the_readme_leads_to_a_file_of_the_release(package):
    text = package.page(read("README.md"), HOME, "1.2.3")
    given, made = targets(read("README.md")), targets(text)
    assert len(made) == len(given) and words(text) == words(read("README.md"))
    for before, after in zip(given, made, strict=True):
        if before.startswith(("https://", "http://")):
            assert after == before
            continue
        kind, path = re.fullmatch(rf"{HOME}/(blob|raw)/v1\.2\.3/(.*)", after).groups()
        assert (kind == "raw") == path.endswith((".png", ".jpg", ".svg", ".gif")), after
        assert (ROOT / path.partition("#")[0]).exists(), after


CASES = {
    "[a](docs/b.md)": ("a", f"[a]({HOME}/blob/v1/docs/b.md)"),
    "[`a[0]`](./docs/b.md#c)": ("`a[0]`", f"[`a[0]`]({HOME}/blob/v1/docs/b.md#c)"),
    '[a [b] c](d.md "e f")': ("a [b] c", f'[a [b] c]({HOME}/blob/v1/d.md "e f")'),
    "see [below](#use).": ("see below.", f"see [below]({HOME}/blob/v1/README.md#use)."),
    "![a](b.png)!": ("!", f"![a]({HOME}/raw/v1/b.png)!"),
    "[![a](b.png)](c.md)": ("", f"[![a]({HOME}/raw/v1/b.png)]({HOME}/blob/v1/c.md)"),
    "[![a](b.png)](https://c.org)": ("", f"[![a]({HOME}/raw/v1/b.png)](https://c.org)"),
    "[a](https://b.org/c) [d](mailto:e@f.org)": ("[a](https://b.org/c) [d](mailto:e@f.org)",) * 2,
    "`[a](b.md)` and ``x ` [c](d.md)``": ("`[a](b.md)` and ``x ` [c](d.md)``",) * 2,
    "```sh\n[a](b.md)\n```\n": ("```sh\n[a](b.md)\n```\n",) * 2,
    "~~~\n```\n[a](b.md)\n~~~\n[c](d.md)": (
        "~~~\n```\n[a](b.md)\n~~~\nc", f"~~~\n```\n[a](b.md)\n~~~\n[c]({HOME}/blob/v1/d.md)",
    ),
    '<img src="a.png" width="9">x': ("x", f'<img src="{HOME}/raw/v1/a.png" width="9">x'),
    '<a href="a.md"><b>c</b></a>': ("<b>c</b>", f'<a href="{HOME}/blob/v1/a.md"><b>c</b></a>'),
    '<a href="a.md"><img alt="b" src="c.png"></a>': (
        "", f'<a href="{HOME}/blob/v1/a.md"><img alt="b" src="{HOME}/raw/v1/c.png"></a>',
    ),
    "a[0](i) is one, f[1] is none": ("a0 is one, f[1] is none", f"a[0]({HOME}/blob/v1/i) is one, f[1] is none"),
    "*[a](b.md)*, **[c](d.md)**": ("*a*, **c**", f"*[a]({HOME}/blob/v1/b.md)*, **[c]({HOME}/blob/v1/d.md)**"),
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_each_form_of_a_link(package, text):
    assert (package.page(text, "", "1"), package.page(text, HOME, "1")) == CASES[text]


def test_the_address_of_the_repository_stands_in_one_line(package):
    assert read("pyproject.toml").count("\nrepository = ") == 1
    assert package.links("", "1") == {}
    assert set(package.links(HOME, "1").values()) == {
        HOME, f"{HOME}/tree/v1/docs", f"{HOME}/blob/v1/CHANGELOG.md", f"{HOME}/issues",
    }  # fmt: skip


# ---------------------------------------------------------------- dependencies


def imported(path):
    """Packages that a module imports anywhere in it, and those it asks for by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


BROUGHT = {"pyarrow": "datasets", "starlette": "gradio", "torchvision": None}
"""What an extra's package brings; torchvision is only looked for, and warned of."""


def test_every_package_that_is_imported_is_declared():
    declared = {plain(re.match(r"[\w.-]+", line)[0]) for line in PROJECT["dependencies"]}
    extras = {
        plain(re.match(r"[\w.-]+", line)[0]) for lines in PROJECT["optional-dependencies"].values() for line in lines
    }
    homes = {**packages_distributions()}
    names = {name.partition(".")[0] for path in SOURCES for name in imported(path)} - set(sys.stdlib_module_names)
    for name in sorted(names - {"fewstep", *BROUGHT}):
        given = {plain(home) for home in homes.get(name, [name])}
        assert given & (declared | extras), f"{name} is imported and not declared"
    assert {home for home in BROUGHT.values() if home} <= extras


def test_every_dependency_has_a_floor_that_was_tried():
    bare = [line for line in PROJECT["dependencies"] if ">=" not in line]
    assert not bare, "floors are proven by `python benchmarks/package.py --oldest`"


# ---------------------------------------------------------------- files


def data_files():
    return {
        path.relative_to(ROOT / "src" / "fewstep").as_posix()
        for path in (ROOT / "src" / "fewstep").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }


def test_every_data_file_is_in_the_wheel():
    patterns = KNOWN["tool"]["setuptools"]["package-data"]["fewstep"]
    matched = {path for pattern in patterns for path in (ROOT / "src" / "fewstep").glob(pattern) if path.is_file()}
    assert {path.relative_to(ROOT / "src" / "fewstep").as_posix() for path in matched} == data_files()


@pytest.mark.slow
def test_wheel_and_source_distribution_hold_everything_and_the_wheel_runs(tmp_path):
    """Built from a copy, so that nothing of the work tree is in the way; installed without dependencies, run with ours.

    ``make package`` does the same in environments of their own, with the declared dependencies alone.
    """
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    names = {name for name in tracked if name and not name.startswith((".ci/", ".gitignore"))}
    for name in names:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    for hook in ("build_sdist", "build_wheel"):
        code = f"from setuptools import build_meta; build_meta.{hook}({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "copy", capture_output=True, check=True)
    [sdist], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as tar:
        assert names <= {member.name.partition("/")[2] for member in tar}
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.removeprefix("fewstep/") for name in archive.namelist() if name.startswith("fewstep/")}
    assert data_files() | {path.relative_to(ROOT / "src" / "fewstep").as_posix() for path in SOURCES} == inside
    assert "tests" not in {name.partition("/")[0] for name in inside}

    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    ours = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "ours.pth").write_text(f"{ours}\n", encoding="utf-8")
    every_name = "import fewstep; [getattr(fewstep, n) for n in fewstep.__all__]; print(fewstep.__file__)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    how = {"cwd": tmp_path, "env": clean, "capture_output": True, "encoding": "utf-8", "check": False}
    python = [tmp_path / "env" / "bin" / "python", "-W", "error"]
    shown = subprocess.run([*python, "-c", every_name], **how)
    assert (shown.returncode, shown.stderr) == (0, "") and str(site) in shown.stdout
    shown = subprocess.run([*python, "-m", "fewstep", "recipes", "list"], **how)
    assert shown.returncode == 0 and "scenes-64-tcd" in shown.stdout


# ---------------------------------------------------------------- what a repository's host reads

PAGES = ("CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
WORKFLOW = yaml.safe_load(read(".github/workflows/checks.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("name", PAGES)
def test_links_and_commands_of_a_page_beside_the_documentation_exist(name):
    page = ROOT / name
    test_docs.test_links_and_images_resolve(page)
    lines = test_docs.command_lines(page)
    assert not {words[1] for words in lines if words[0] == "make"} - TARGETS
    assert [wrong for words in lines if words[0] == "fewstep" for wrong in test_docs.wrong_words(words[1:])] == []
    files = [
        word for words in lines for word in words if "/" in word and word.startswith(("tests", "benchmarks", "docs"))
    ]
    assert [file for file in files if not (ROOT / file).exists()] == []


def steps():
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_what_there_is():
    lines = [line.split() for step in steps() for line in step.get("run", "").splitlines()]
    assert {words[1] for words in lines if words[0] == "make"} == {"test"} <= TARGETS
    files = [word for words in lines for word in words if word.startswith(("tests/", "benchmarks/"))]
    assert len(files) > 5 and [file for file in files if not (ROOT / file).exists()] == []
    caches = [step["with"]["cache-dependency-path"].split() for step in steps() if "cache" in step.get("with", {})]
    assert caches and all((ROOT / file).is_file() for files in caches for file in files)


def test_the_workflow_tests_the_pythons_that_the_package_names():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert WORKFLOW["jobs"]["linux"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert set(WORKFLOW["jobs"]["others"]["strategy"]["matrix"]["system"]) == {"windows-latest", "macos-latest"}


@pytest.mark.parametrize("name", ["bug", "method"])
def test_an_issue_form_asks_for_what_is_needed(name):
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= form.keys()
    required = [item["attributes"]["label"] for item in form["body"] if item.get("validations", {}).get("required")]
    assert {"bug": "What `fewstep doctor` prints", "method": "The paper"}[name] in required
    assert len({item["id"] for item in form["body"]}) == len(form["body"])


def test_the_citation_has_what_the_format_requires():
    known = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= known.keys()
    assert known["license"] == PROJECT["license"] and known["authors"] == PROJECT["authors"]


def instructions(file):
    """(instruction, arguments) of a Dockerfile, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_an_image_runs_fewstep_as_somebody_else_than_root(file):
    found = instructions(file)
    last = dict(found)
    assert last["USER"] == "1000" and last["ENTRYPOINT"] == '["fewstep"]' and last["WORKDIR"] == "/work"
    order = [name if name != "RUN" else "deps" if "-r " in rest else "package" for name, rest in found]
    assert order.index("deps") < len(order) - 1 - order[::-1].index("package")  # a change of the code keeps that layer
    bases = {rest.split()[0] for name, rest in found if name == "FROM"}
    assert bases == {f"python:{PROJECT['requires-python'].removeprefix('>=')}-slim-bookworm"}


def test_the_images_are_made_of_what_the_package_needs():
    """The first step of both: a wheel from the files that .dockerignore lets through, and its requirements."""
    kept = {line.removeprefix("!") for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert kept == {"src", "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    assert len(DOCKERFILES) == 2
    for file in DOCKERFILES:
        [code] = re.findall(r'python -c "(.*?)"', " ".join(rest for _, rest in instructions(file)))
        made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
        assert set(made.stdout.split("\n")) >= set(PROJECT["dependencies"])
