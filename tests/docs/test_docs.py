"""The documentation against the code: links, command lines, imports, recipes, settings tables and words.

A page that names a command, an option, a setting, a default, a file or a heading that no longer exists fails here.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import TypeAdapter

from fewstep.cli import app
from fewstep.methods.parts import statistics
from fewstep.methods.registry import METHODS
from fewstep.recipe.schema import Recipe
from fewstep.reports.checks import CHECKS
from tests.test_floors import FLOORS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
COMMAND = typer.main.get_command(app)
RECIPES = {path.stem for path in (ROOT / "src" / "fewstep" / "recipes").glob("*.yaml")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

PRIVATE_WORDS = (
    "told", "verdict", "verdicts", "landing", "landings", "hop", "hops", "likeness", "standings", "symptoms", "wishes",
    "game", "games", "pull", "pulls", "picture", "pictures", "advice", "reader", "readers", "let go", "foretold",
    "forward equivalents", "what is stated", "what is drawn",
)  # fmt: skip
"""Words of this project's past that no reader from the field knows; images are generated, networks predict."""


def relative(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, *languages):
    """Contents of the fenced blocks of these languages; "" is none."""
    return [body for language, body in FENCE.findall(text_of(page)) if language in languages]


def prose(page):
    """The page without fenced and indented code, inline code, formulas and the targets of links."""
    text = FENCE.sub("", text_of(page))
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"\$\$?[^$]*\$\$?", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page)))


def command_lines(page):
    """Every command line that a page shows, as words: in shell blocks, indented blocks and inline code."""
    lines = [line for body in blocks(page, "sh", "") for line in body.splitlines()]
    lines += [line.strip() for line in FENCE.sub("", text_of(page)).splitlines() if line.startswith("    ")]
    found = []
    for line in [*lines, *inline_code(page)]:
        try:
            words = shlex.split(line.replace("…", "..."), comments=True)
        except ValueError:  # an apostrophe of prose in inline code
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def slugs(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_images_resolve(page):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in slugs(file)):
            lost.append(target)
    assert lost == []


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            links = re.findall(r"\]\(([^)#\s]+)", text_of(page))
            waiting += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
            waiting += [path / "README.md" for path in waiting if path.is_dir()]
            waiting = [path for path in waiting if path.is_file()]
    assert set(PAGES) - seen == set()


# ---------------------------------------------------------------- command lines


def wrong_words(words):
    """What of a `fewstep` command line does not exist: its command, or options of it."""
    command, rest = COMMAND, list(words)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return [rest[0]]
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    return [word for word in rest if word.startswith("-") and word.split("=")[0] not in known]


def fewstep_lines(page):
    for words in command_lines(page):
        if words[0] == "fewstep":
            yield words[1:]
        elif words[0] in ("torchrun", "python") and words[1:].count("fewstep"):
            yield words[words.index("fewstep") + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_and_options_exist(page):
    assert [words for words in fewstep_lines(page) if wrong_words(words)] == []


def test_wrong_commands_and_options_are_seen():
    assert wrong_words(["distil", "my.yaml"]) == ["distil"]
    assert wrong_words(["reward", "scene", "out"]) == ["scene"]
    assert wrong_words(["distill", "my.yaml", "--rseume"]) == ["--rseume"]
    assert wrong_words(["distill", "my.yaml", "--resume", "--set", "training.steps=3"]) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_recipes_that_are_named_are_shipped(page):
    named = [word for words in fewstep_lines(page) for word in words] + inline_code(page)
    wrong = [w for w in named if re.fullmatch(r"(scenes-64|sdxl|sd15|sd3|flux)-[\w-]+", w) and w not in RECIPES]
    checkpoints = {"sdxl-lightning-4step-lora"}
    assert set(wrong) - checkpoints == set()


def known_key(key):
    """Whether a recipe has this dotted key, e.g. training.steps or method.guidance_scale."""
    section, _, name = key.partition(".")
    if section == "stages":
        return known_key(name.partition(".")[2])
    if section == "method" and name:
        return any(name in {f.name for f in dataclasses.fields(cls.Settings)} for cls in METHODS.values())
    if section not in Recipe.model_fields or not name:
        return section in Recipe.model_fields
    kind = type(Recipe.model_fields[section].get_default(call_default_factory=True))
    fields = kind.model_fields if hasattr(kind, "model_fields") else {f.name for f in dataclasses.fields(kind)}
    return name in fields


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_keys_that_are_set_exist(page):
    wrong = []
    for words in command_lines(page):
        for option, value in pairwise(words):
            if option == "--set" and "=" in value and not known_key(value.partition("=")[0]):
                wrong.append(value)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_scripts_modules_and_tests_exist(page):
    lost = []
    for words in command_lines(page):
        if words[0] == "pytest":
            lost += _lost_tests(words[1:])
        elif words[:2] == ["python", "-m"] or (words[0] == "torchrun" and "-m" in words):
            module = words[words.index("-m") + 1].replace(".", "/")
            homes = [ROOT / module, ROOT / f"{module}.py", ROOT / "src" / module, ROOT / "src" / f"{module}.py"]
            found = [home for home in homes if home.exists()]
            lost += [] if found else [module]
            if found and found[0].suffix == ".py":  # a script with options of its own
                options = [word for word in words[words.index("-m") + 2 :] if word.startswith("--")]
                lost += [option for option in options if f'"{option}"' not in text_of(found[0])]
        elif words[0] == "python" and words[1:] and words[1].endswith(".py"):
            lost += _lost_script(words[1:])
        elif words[0] == "make":
            lost += [t for t in words[1:] if not re.search(rf"^{t}:", text_of(ROOT / "Makefile"), re.MULTILINE)]
    assert lost == []


def _lost_tests(words):
    paths = [word for word in words if "/" in word]
    lost = [path for path in paths if not (ROOT / path).exists()]
    if "-k" in words and not lost:
        part = words[words.index("-k") + 1]
        files = [ROOT / path for path in paths if (ROOT / path).is_file()]
        lost += [] if any(part in text_of(file) for file in files) else [part]
    return lost


def _lost_script(words):
    script = ROOT / words[0]
    if not script.exists():
        return [words[0]]
    options = [word for word in words[1:] if word.startswith("--")]
    files = [word for word in words[1:] if word.startswith("benchmarks/")]
    lost = [option for option in options if f'"{option}"' not in text_of(script)]
    return lost + [file for file in files if not list(ROOT.glob(file))]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_paths_in_inline_code_exist(page):
    """`tests/...`, `benchmarks/...` and rooms of the package with a file name; stars stand for any."""
    lost = []
    for code in inline_code(page):
        if re.fullmatch(r"(tests|benchmarks|docs)/[\w./*-]+", code):
            lost += [] if list(ROOT.glob(code)) else [code]
        elif re.fullmatch(r"\w+/([\w*]+/)*[\w*]+\.py", code):
            src = ROOT / "src" / "fewstep"
            lost += [] if [*src.glob(code), *src.glob(f"methods/{code}"), *ROOT.glob(code)] else [code]
    assert lost == []


# ---------------------------------------------------------------- Python and YAML blocks


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_that_are_imported_exist(page):
    lost = []
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fewstep":
                module = importlib.import_module(node.module)
                lost += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
    assert lost == []


@pytest.mark.parametrize("name", ["sampling", "training-from-python", "scenes-64"])
def test_examples_run(name, tmp_path, monkeypatch):
    """Python blocks that need neither a run of the user's nor diffusers, with few steps and points.

    As they stand, and with all others, they run in tests/docs/test_blocks.py.
    """
    monkeypatch.chdir(tmp_path)
    names = {"__name__": f"example_{name}"}
    bodies = [body for body in blocks(DOCS / f"{name}.md", "python") if "from diffusers import" not in body]
    assert bodies
    for body in bodies:
        short = re.sub(r"\b(2000|1000|4096)\b", "20", body) if name == "training-from-python" else body
        exec(compile(short, f"{name}.md", "exec"), names)


def recipes_in(page):
    """Every recipe that a page shows, stages apart, with a method where the fragment names none."""
    for body in blocks(page, "yaml"):
        content = yaml.safe_load(body)
        top = {key: value for key, value in content.items() if key != "stages"}
        for stage in content.get("stages", [{}]):
            if not stage.get("merge"):
                yield {"method": "tcd"} | top | {k: v for k, v in stage.items() if k != "name"}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_recipes_that_are_shown_are_valid(page):
    for shown in recipes_in(page):
        recipe = Recipe.model_validate(shown)
        settings = {key: value for key, value in recipe.method.items() if key != "name"}
        kind = METHODS[recipe.method["name"]].Settings
        unknown = settings.keys() - {field.name for field in dataclasses.fields(kind)}
        assert unknown == set()
        TypeAdapter(kind).validate_python(settings)


# ---------------------------------------------------------------- methods


def settings_table(page):
    """(name, default) of each row of the table "| Setting | Default | ..."."""
    body = text_of(page).split("| Setting | Default |", 1)[1].split("\n\n", 1)[0]
    rows = [line.split("|")[1:3] for line in body.splitlines()[2:]]
    return [(name.strip().strip("`"), yaml.safe_load(value.strip().strip("`"))) for name, value in rows]


def plain(value):
    """A default as YAML reads it: lists for tuples, and of a dataclass what is not its own default."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        own = {field.name: field.default for field in dataclasses.fields(value)}
        return {name: plain(item) for name, item in given.items() if item != own[name]}
    return value


@pytest.mark.parametrize("name", METHODS)
def test_settings_tables_are_the_settings(name):
    settings = METHODS[name].Settings()
    truth = [(field.name, plain(getattr(settings, field.name))) for field in dataclasses.fields(settings)]
    assert settings_table(DOCS / "methods" / f"{name}.md") == truth


def test_every_method_has_a_page_and_no_other():
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == {*METHODS, "README"}


@pytest.mark.parametrize("name", METHODS)
def test_pages_of_methods_have_the_same_sections(name):
    text = text_of(DOCS / "methods" / f"{name}.md")
    wanted = ["The idea", "The loss", "Settings", "Cost", "When to choose it", "Signs that it fails", "Our figures"]
    places = [text.find(f"\n## {heading}\n") for heading in wanted]
    assert min(places) > 0 and places == sorted(places)


def test_the_tables_of_damage_are_the_committed_figures():
    """Each cell of docs/measuring.md, from benchmarks/results/damage.json as benchmarks/damage.py writes it."""
    spec = importlib.util.spec_from_file_location("damage", ROOT / "benchmarks" / "damage.py")
    damage = sys.modules.setdefault("damage", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(damage)
    assert damage.tables(json.loads(text_of(damage.RESULTS))) in text_of(DOCS / "measuring.md")


@pytest.mark.parametrize("name", METHODS)
def test_checks_that_signs_name_exist(name):
    """The middle column of "Signs that it fails" holds names of checks of `fewstep diagnose`, or a dash."""
    table = text_of(DOCS / "methods" / f"{name}.md").split("| Sign | Check of `fewstep diagnose` |")[1].split("\n\n")[0]
    named = {part.strip() for row in table.splitlines()[2:] for part in row.split("|")[2].split(",")} - {"–"}
    assert named and named <= {check.name for check in CHECKS}


def test_the_table_of_checks_is_the_checks():
    table = text_of(DOCS / "diagnosing.md").split("| Check | Limit |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    truth = [(check.name + ("" if check.fatal else " (worth knowing)"), f"{check.limit:g}") for check in CHECKS]
    assert [(name.strip(), limit.strip()) for name, limit in rows] == truth


def test_statistics_that_the_contract_names_exist():
    """Each plain name of the table is a string in the methods' code; each function has the parameters shown."""
    table = text_of(DOCS / "diagnosing.md").split("| Name | What it measures | Source |")[1].split("\n\n")[0]
    code = "".join(text_of(path) for path in (ROOT / "src" / "fewstep" / "methods").rglob("*.py"))
    for row in table.splitlines()[2:]:
        _, names, _, source, _ = row.split("|")
        plain_names = [name for name in re.findall(r"`([^`]+)`", names) if re.fullmatch(r"\w+", name)]
        assert [name for name in plain_names if f'"{name}"' not in code] == []
        for function, parameters in re.findall(r"`(\w+)\(([^)]*)\)`", source):
            found = inspect.signature(getattr(statistics, function)).parameters
            assert list(found) == parameters.split(", ")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_page_speaks_the_private_dialect(page):
    text = prose(page)
    found = [w for w in PRIVATE_WORDS if re.search(rf"(?<![\w-]){w}(?![\w-])", text, re.IGNORECASE)]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_first_paragraph_says_for_whom(page):
    if page == ROOT / "README.md":
        return
    first = text_of(page).split("\n\n")[1]
    assert first.startswith("For people who"), first


# ---------------------------------------------------------------- architecture


def test_the_table_of_rooms_is_the_house():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", text_of(DOCS / "architecture.md"), re.MULTILINE)
    assert {room: int(floor) for room, floor in rows} == {room: height + 1 for room, height in FLOORS.items()}
