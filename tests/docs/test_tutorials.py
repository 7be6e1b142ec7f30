"""The tutorials: their lines run on tiny pipelines of the same kind, the notebook's cells on few steps.

Slow tests change what the reader has and time: the teacher is a tiny random pipeline, and the recipe is cut as in
tests/docs/test_blocks.py, in float32 on the CPU. The commands are those of the pages.
"""

import ast
import importlib
import json
import re
import shlex
import sys

import pytest

from tests.command_line import SHORT, sets
from tests.docs.test_blocks import BLOCK, lines
from tests.docs.test_docs import DOCS, ROOT, text_of

NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
FEWER = {
    "training.steps=300": "training.steps=4",
    "data.size=1000": "data.size=16",
    '"sample.every=1000"': '"training.batch_size=4"',
    "(50, 4)": "(6, 4)",
    "[50, 4]": "[6, 4]",
    "64), seed=0": "16), seed=0",
}
"""What the test of the notebook changes in its cells."""


def cells(notebook, kind="code"):
    found = json.loads(text_of(notebook))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_the_method_of_the_tutorial_is_the_one_that_is_verified():
    [block] = [
        body
        for _, language, body in BLOCK.findall(text_of(DOCS / "tutorials/write-a-method.md"))
        if language == "python"
    ]
    assert block in text_of(ROOT / "tests/verification/mine.py")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed_small_and_calls_what_exists(notebook):
    content = json.loads(text_of(notebook))
    assert notebook.stat().st_size <= 200_000
    assert all(
        cell["outputs"] or "distill(" in "".join(cell["source"])
        for cell in content["cells"]
        if cell["cell_type"] == "code"
    )
    for output in [output for cell in content["cells"] for output in cell.get("outputs", [])]:
        assert output["output_type"] != "error" and "Traceback" not in json.dumps(output)
    tree = ast.parse("\n".join(cells(notebook)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fewstep"):
            assert [a.name for a in node.names if not hasattr(importlib.import_module(node.module), a.name)] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_resolve(notebook):
    targets = [t for cell in cells(notebook, "markdown") for t in re.findall(r"\]\(([^)#\s]+)", cell)]
    assert targets and [target for target in targets if not (notebook.parent / target).resolve().exists()] == []


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_with_fewer_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "\n".join(cells(DOCS / "tutorials/scenes-64.ipynb"))
    for shown, short in FEWER.items():
        assert shown in source
        source = source.replace(shown, short)
    exec(compile(source, "scenes-64.ipynb", "exec"), {"__name__": "notebook"})


@pytest.mark.slow
@pytest.mark.parametrize("page, kind, form", [("own-sdxl", "sdxl", "kohya"), ("flux-lora", "flux", "lora")])
def test_three_commands_make_an_exported_lora_of_ones_own_model(page, kind, form, tmp_path, monkeypatch):
    """prepare, distill, export: the first block of the page, on a tiny random pipeline, to a file of its layers."""
    from fewstep.cli import main
    from fewstep.models.lora_files import read_tensors
    from fewstep.scenes64.scenes import Scenes, write_image_folder
    from tests.models.pipelines import build

    monkeypatch.chdir(tmp_path)
    build(kind).save_pretrained("tiny")
    write_image_folder(tmp_path / "my-images", Scenes(seed=3), 8)
    ours = [*SHORT, "teacher.path=tiny", "teacher.size=64", "teacher.dtype=fp32", "training.device=cpu",
            "training.precision=fp32", "training.accumulation=1", "sample.prompts=[a red star]"]  # fmt: skip
    body = BLOCK.search(text_of(DOCS / "tutorials" / f"{page}.md"))[3]
    commands = [shlex.split(line) for line in lines(body)]
    assert [words[:2] for words in commands] == [["fewstep", name] for name in ("prepare", "distill", "export")]
    for words in commands:
        monkeypatch.setattr(sys, "argv", [*words, *([] if words[1] == "export" else ["--quiet", *sets(ours)])])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code in (None, 0)
    [file] = (tmp_path / commands[2][2] / "export" / form).glob("*.safetensors")
    assert len(read_tensors(file)[0]) > 20 and (file.parent / "README.md").is_file()
