"""The documentation site: its navigation, its diagrams, its reference; and the site itself if MkDocs is here."""

import hashlib
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

import fewstep
from tests.docs.test_docs import DOCS, PAGES, ROOT, text_of

LISTED = re.compile(r"^::: fewstep\.(\S+)$", re.MULTILINE)
PUBLIC = [
    "fewstep",
    *sorted(
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "src" / "fewstep").rglob("*.py")
        if path != ROOT / "src" / "fewstep" / "__init__.py" and "\n__all__ =" in text_of(path)
    ),
]


class Settings(yaml.SafeLoader):
    """YAML of mkdocs.yml, whose tags name Python functions."""


Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def navigation(entry):
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in navigation(part)]


def test_the_navigation_holds_every_page_once():
    shown = navigation(yaml.load(text_of(ROOT / "mkdocs.yml"), Settings)["nav"])
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    notebooks = [str(page.relative_to(DOCS).with_suffix(".md")) for page in DOCS.rglob("*.ipynb")]
    measured = [str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks").rglob("*.md")]
    assert sorted(shown) == sorted([*pages, *notebooks, *measured])


def test_every_diagram_is_drawn():
    """The site shows a drawing, named by the hash of the diagram's text, and needs no script for it."""
    found = {
        hashlib.sha256(body.encode()).hexdigest()[:12]
        for page in PAGES
        for body in re.findall(r"^```mermaid\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
        if page.is_relative_to(DOCS)
    }
    assert {path.stem for path in (DOCS / "diagrams").glob("*.svg")} == found


# ---------------------------------------------------------------- the reference


def found(name):
    """The object that a page lists as ``fewstep.NAME``, and its own place; values that are equal may be different."""
    home, _, last = name.rpartition(".")
    module = importlib.import_module(f"fewstep.{home}" if home else "fewstep")
    value = getattr(module, last)
    return (value.__module__, value.__qualname__) if isinstance(value, type) or callable(value) else (last, id(value))


def test_the_reference_lists_every_public_name_once():
    listed = Counter(found(name) for page in (DOCS / "api").glob("*.md") for name in LISTED.findall(text_of(page)))
    public = {
        found(f"{module.removeprefix('fewstep')}.{name}".lstrip("."))
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
    }
    assert len(public) > 60 and set(listed) == public and max(listed.values()) == 1


def test_names_that_are_importable_from_fewstep_are_listed_so():
    listed = [name for page in (DOCS / "api").glob("*.md") for name in LISTED.findall(text_of(page))]
    assert {name for name in listed if "." not in name} == set(fewstep.__all__)


# ---------------------------------------------------------------- the site


@pytest.mark.needs("mkdocs", "material", "mkdocstrings", "latex2mathml")
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_outside(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    pages = {page.relative_to(tmp_path): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages.values():
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"' >]+)", page)
        loaded += re.findall(r"<link\b[^>]*\bhref=[\"']?([^\"' >]+)", page)
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []
        assert '<pre class="mermaid"' not in page and 'class="arithmatex"' not in page  # scripts would be fetched
    shown = "".join(page for place, page in pages.items() if place.parts[0] == "api")
    for page in (DOCS / "api").glob("*.md"):
        assert [name for name in LISTED.findall(text_of(page)) if f'id="fewstep.{name}"' not in shown] == []
    assert "<math" in pages[Path("methods/tcd.html")]
