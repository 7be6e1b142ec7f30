"""Every block of code of the documentation: it has a language, it parses, and it runs or says why it does not.

An HTML comment right before a block, ``<!-- not run: takes minutes -->``, is the reason. All other blocks of Python and
of the shell run, page by page, in a folder that holds what the pages speak of: a finished run, a recipe, images.

What is changed so that all of it lasts a minute of one core, and nothing else: recipes are cut to a few steps, data
and prompts to a few (`CUT`), names in capitals stand for a run or recipe (`STAND_INS`), and lines of other programs
(pip, torchrun, pytest, make, python) are left to the tests that check their words (tests/docs/test_docs.py).
"""

import ast
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.command_line import SHORT, sets
from tests.docs.test_docs import DOCS, ROOT, relative, text_of

PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"(?:^<!-- not run: ([^>]+?) -->\n)?^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "sh", "yaml", "json", "text", "mermaid"}
REASON = re.compile(
    r"(needs a GPU|downloads|takes minutes|takes hours|opens a page|needs [a-z]+|the same lines run in)\b"
)

CUT = {
    "distill": ["--quiet", *sets(SHORT)],
    "prepare": ["--quiet", *sets(SHORT)],
    "scenes": ["--count", "8"],
    "report": ["--count", "8"],
    "evaluate": ["--count", "8"],
}
"""What is added to commands; the last value of an option counts."""
STAND_INS = {"RUN": "runs/mine", "RUN_A": "runs/mine", "RUN_B": "runs/other", "RECIPE": "my.yaml"}
OTHERS = {"pip", "torchrun", "pytest", "make", "python", "git", "cd"}


def found(page):
    """(reason, language, body) of each block."""
    return BLOCK.findall(text_of(page))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_blocks_have_a_language_and_parse(page):
    for reason, language, body in found(page):
        assert language in LANGUAGES, body
        assert not reason or REASON.match(reason), reason
        if language == "python":
            ast.parse(body)
        elif language == "json":
            json.loads(body)
        elif language == "yaml":
            assert isinstance(yaml.safe_load(body), dict)
        elif language == "sh":
            assert all(shlex.split(line.replace("…", "..."), comments=True) or True for line in lines(body))


def lines(body):
    """The command lines of a block; a backslash continues one."""
    return [line for line in body.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_block_is_indented(page):
    """Indented blocks have no language and no reason. Continued items of a list are indented by two."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\n\n( {4}\S.*)", text) == []


# ---------------------------------------------------------------- running them


def to_run(page):
    return [(language, body) for reason, language, body in found(page) if language in ("python", "sh") and not reason]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the pages speak of."""
    from PIL import Image

    from fewstep.recipe.load import load_recipe
    from fewstep.runs.distill import distill
    from fewstep.scenes64.scenes import Scenes, write_image_folder

    folder = tmp_path_factory.mktemp("desk")
    shutil.copy(ROOT / "src/fewstep/recipes/scenes-64-tcd.yaml", folder / "my.yaml")
    write_image_folder(folder / "my-images", Scenes(seed=3), 8)
    Image.fromarray(Scenes(seed=3).render(range(1)).images[0]).save(folder / "star.png")
    Image.new("L", (64, 64), 255).save(folder / "mask.png")
    (folder / "prompts.txt").write_text("a red star\ntwo shapes\na blue ring\na heart\n" * 4)
    shutil.copy(ROOT / "tests/verification/mine.py", folder / "mine.py")
    (folder / "src").symlink_to(ROOT / "src")
    distill(load_recipe("scenes-64-tcd", SHORT), folder / "runs/mine")
    shutil.copytree(folder / "runs/mine", folder / "runs/other")
    [lora] = (folder / "runs/mine").glob("student/*.safetensors")
    for style in ("style.safetensors", "pixels.safetensors"):
        shutil.copy(lora, folder / style)
    return folder


def made_by(words):
    """What a command makes, and refuses to write over: it was made by an earlier page."""
    if words[0] == "distill" and "--out" in words and "--resume" not in words:
        return [words[words.index("--out") + 1]]
    return {"scenes": words[1:2], "recipes": words[3:]}.get(words[0], [])


def run_line(words):
    from fewstep.cli import main

    given = [STAND_INS.get(word, word) for word in words[1:]]
    for made in made_by(given):
        shutil.rmtree(made, ignore_errors=True)
        Path(made).unlink(missing_ok=True)
    sys.argv = ["fewstep", *given, *CUT.get(given[0], [])]
    try:
        main()
    except SystemExit as stopped:
        # `diagnose` says by 1 that something is wrong with a run of four steps
        assert stopped.code in (None, 0) or (given[0] == "diagnose" and stopped.code == 1), given


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=relative)
def test_blocks_run(page, desk, tmp_path, monkeypatch):
    shutil.copytree(desk, tmp_path / "desk", symlinks=True)  # the run as it was, whatever other pages made of it
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    names = {"__name__": f"example_{page.stem}"}
    for language, body in to_run(page):
        if language == "python":
            exec(compile(body, str(page), "exec"), names)
            continue
        for line in lines(body):
            words = shlex.split(line, comments=True)
            assert words[0] in OTHERS | {"fewstep"}, line
            if words[0] == "fewstep":
                run_line(words)
