"""What stands before the work: quick starts, names that are missing, hubs that do not answer, what comes next."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import shlex
import subprocess
import sys
import warnings

import pytest
import yaml
from pydantic import TypeAdapter

import fewstep
from fewstep.checkpoints.registry import FILE, Checkpoint, checkpoints
from fewstep.diffusion.schedule import Schedule
from fewstep.models.hub import Remark, asking_hub
from fewstep.recipe.chain import load
from fewstep.recipe.load import load_recipe, parse_recipe
from fewstep.recipe.shipped import purpose, shipped_recipes
from fewstep.runs.hints import next_commands, own_prompts
from fewstep.sampling.samplers import make_sampler, sampler_name
from fewstep.scenes64.scenes import Scenes, write_image_folder
from fewstep.training.run_files import refuse_missing_run
from tests.command_line import inside, sets

HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "safetensors", "PIL", "huggingface_hub", "scipy")


@pytest.mark.parametrize("words", ["--help", "--version", "recipes", "recipes show sdxl-lcm", "checkpoints"])
def test_what_only_lists_imports_nothing_heavy(words):
    """Modules are counted, whatever else the machine does meanwhile."""
    code = f"""
import sys
sys.argv = ["fewstep", *{words.split()!r}]
from fewstep.cli import main
try:
    main()
finally:
    print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "[]") and len(done.stdout) > 10


def test_the_registry_that_is_read_without_pydantic_is_what_pydantic_reads():
    read = TypeAdapter(list[Checkpoint]).validate_python(json.loads(FILE.read_text(encoding="utf-8")))
    assert list(checkpoints().values()) == read


def test_the_list_of_recipes_has_whole_sentences(tmp_path, monkeypatch, capsys):
    """Of each recipe the first sentence of its comment, however many lines it takes, in one line."""
    _, output, _ = inside(monkeypatch, capsys, tmp_path, "recipes")
    listed = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert listed.keys() == shipped_recipes().keys()
    for name, path in shipped_recipes().items():
        comment = path.read_text(encoding="utf-8").split("\n\n")[0].replace("\n# ", " ").removeprefix("# ")
        assert listed[name].endswith(".") and comment.startswith(listed[name]) and ". " not in listed[name]
    assert "a LoRA for one to eight steps." in listed["scenes-64-hyper"]
    (tmp_path / "mine.yaml").write_text("method: lcm\n")
    assert purpose(tmp_path / "mine.yaml") == ""


@pytest.mark.parametrize("name", ["runs/none", "runs/mien", "mine/a/none", "other/none"])
def test_a_missing_run_is_no_matter_for_the_hub(name, tmp_path, monkeypatch, capsys):
    """Beside runs a name is a run's; the hub, on which it could be a model's, is not asked, by no command."""
    for there in ("runs/mine", "mine/a/seed-0", "other/x"):
        (tmp_path / there).mkdir(parents=True)
        (tmp_path / there / "recipe.yaml").write_text("{}")
    monkeypatch.setattr("fewstep.models.families.load.downloaded", lambda name: pytest.fail("the hub is asked"))
    monkeypatch.setattr("fewstep.models.meta_pipeline._downloaded_configs", lambda name: pytest.fail("asked"))
    for command in (
        ["sample", name], ["sample", "scenes-64", "--base", name],
        ["distill", "scenes-64-lcm", "--set", f"teacher.path={name}", "--dry-run"],
        ["distill", "scenes-64-lcm", "--set", f"teacher.path={name}", "--out", "new"],
    ):  # fmt: skip
        code, _, errors = inside(monkeypatch, capsys, tmp_path, *command)
        assert code == 2 and f"There is no run {name}: " in errors, (command, errors)
    assert not (tmp_path / "new").exists()
    if name == "runs/mien":
        assert "did you mean runs/mine?" in errors


def test_other_names_may_be_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stabilityai").mkdir()
    (tmp_path / "here").mkdir()
    for name in ("stabilityai/sdxl-turbo", "owner/name", "name", "here", "../x"):
        refuse_missing_run(name)


def test_a_hub_that_does_not_answer_is_said_at_once():
    """Its client's lines, as they come, are sentences; what it says otherwise stays."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    handlers = logging.getLogger("huggingface_hub").handlers[:]
    with warnings.catch_warnings(record=True) as found, asking_hub("owner/name"):
        warnings.simplefilter("always")
        assert len(found) == 0 or "asking" in str(found[0].message)
        logger.warning("'[Errno 111] Connection refused' thrown while requesting GET http://hub/api")
        logger.warning("Retrying in 2s [Retry 2/5].")
        logger.warning("Rate limited. Waiting 3.0s before retry [Retry 3/5].")
        logger.warning("A token is expired.")
    said = [str(w.message) for w in found if w.category is Remark and "asking" not in str(w.message)]
    assert said == [
        "The hub does not answer for owner/name: attempt 2 of 5 follows after 2 s.",
        "The hub does not answer for owner/name: attempt 3 of 5 follows after 3.0 s.",
        "A token is expired.",
    ]
    assert logging.getLogger("huggingface_hub").handlers == handlers


def test_the_hub_is_named_before_it_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.warns(Remark, match="^owner/name is not on this machine: asking http"), asking_hub("owner/name"):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with asking_hub("owner/name", cached=True):
            pass
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with asking_hub("owner/name"):
            pass


# ---------------------------------------------------------------- ComfyUI's names


def test_comfyuis_names_are_taken_for_what_steps_alike(tiny, tmp_path, monkeypatch, capsys):
    """tests/export/test_comfyui.py runs these by ComfyUI's formulas; on flow models they step otherwise there."""
    assert {name: sampler_name(name) for name in ("dpmpp_2m", "euler_ancestral", "euler", "ddim", "heun", "lcm")} == {
        "dpmpp_2m": "dpm++2m", "euler_ancestral": "euler-ancestral", "euler": "euler", "ddim": "ddim", "heun": "heun",
        "lcm": "lcm",
    }  # fmt: skip
    assert make_sampler("dpmpp_2m", num_inference_steps=3) == make_sampler("dpm++2m", num_inference_steps=3)
    assert parse_recipe({"method": "lcm", "sample": {"sampler": "dpmpp_2m"}}).sample.sampler == "dpm++2m"
    model = fewstep.load(tiny)
    a, b = (model.generate("a star", 3, sampler=name).latents for name in ("dpmpp_2m", "dpm++2m"))
    assert (a == b).all()
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "sample", tiny, "--sampler", "dpmpp_2m_sde")
    assert code == 2 and "Unknown sampler 'dpmpp_2m_sde': use lcm, " in errors
    assert "or ComfyUI's names euler_ancestral, dpmpp_2m. Did you mean dpmpp_2m?" in errors


def test_a_name_of_comfyuis_that_means_other_steps_on_this_model_is_refused(tiny):
    flow = fewstep.load(tiny)
    flow.denoiser = copy.copy(flow.denoiser)
    flow.denoiser.schedule = Schedule.flow(3.0)
    for theirs, ours in (("dpmpp_2m", "dpm++2m"), ("euler_ancestral", "euler-ancestral")):
        with pytest.raises(ValueError, match=rf"^ComfyUI's {theirs} steps otherwise than {ours.replace('+', '.')} on"):
            flow.sampler(theirs, {"num_inference_steps": 4})
        assert flow.sampler(ours, {"num_inference_steps": 4}).name == ours
    assert flow.sampler("euler", {"num_inference_steps": 4}).name == "euler"


# ---------------------------------------------------------------- what comes next


def test_prompts_of_a_hint_are_those_of_the_recipe(tmp_path):
    scenes = load_recipe("scenes-64-lcm")
    assert own_prompts(scenes) == list(scenes.sample.prompts[:2])
    mine = load_recipe("scenes-64-lcm", ['sample={prompts: ["my cat", "my dog", "my hat"]}'])
    assert own_prompts(mine) == ["my cat", "my dog"]
    write_image_folder(tmp_path / "images", Scenes(1), 12)
    captions = [json.loads(line)["text"] for line in (tmp_path / "images" / "metadata.jsonl").open()]
    own = load_recipe("scenes-64-lcm", ["data={source: folder}", f"data.path={tmp_path / 'images'}"])
    assert len(own_prompts(own)) == 2 and set(own_prompts(own)) < set(captions)
    asked = load_recipe(
        "scenes-64-lcm", ["data={source: folder}", f"data.path={tmp_path / 'images'}",
                          'sample={prompts: ["a photo of sks"]}'],
    )  # fmt: skip
    assert own_prompts(asked) == ["a photo of sks"]
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}{' and more' * (n % 3)}\n" for n in range(9)))
    evaluated = own.model_copy(
        update={"evaluate": own.evaluate.model_copy(update={"prompts": str(tmp_path / "prompts.txt")})}
    )
    assert own_prompts(evaluated) == ["prompt 0", "prompt 3"]


def test_a_device_is_for_every_stage_and_leaves_the_rest():
    chain = load("scenes-64-hyper")
    for recipe in (chain, load("scenes-64-lcm")):
        moved, data = recipe.on_device("cuda"), yaml.safe_load(recipe.as_yaml())
        for stage in data.get("stages", [data]):
            if "merge" not in stage:
                stage["training"]["device"] = "cuda"
        assert yaml.safe_load(moved.as_yaml()) == data and recipe.on_device(None) == recipe


@pytest.mark.slow
def test_three_commands_lead_from_a_model_to_its_export(short, tmp_path, monkeypatch, capsys):
    """Each command names the next one, with the paths and prompts of this run."""
    write_image_folder(tmp_path / "images", Scenes(1), 16)
    own = [*sets(short), "--set", "data.source=folder", "--set", "data.path=images"]
    code, output, errors = inside(monkeypatch, capsys, tmp_path, "distill", "scenes-64-lcm", *own, "-q")
    assert code == 0, errors
    shown = [line.strip() for line in output.splitlines() if line.startswith("  fewstep ")]
    assert [line.split()[1] for line in shown] == ["sample", "evaluate", "export"]
    assert all(line.split()[2] == "runs/scenes-64-lcm" for line in shown)
    captions = [json.loads(line)["text"] for line in (tmp_path / "images" / "metadata.jsonl").open()]
    words = shlex.split(shown[0])
    assert all(prompt in captions for flag, prompt in itertools.pairwise(words) if flag == "-p")
    assert shown[2].endswith("--to lora")
    assert inside(monkeypatch, capsys, tmp_path, *words[1:])[0] == 0
    code, output, errors = inside(monkeypatch, capsys, tmp_path, *shlex.split(shown[2])[1:])
    assert code == 0 and "runs/scenes-64-lcm/export/lora" in output, errors
    assert next_commands(load_recipe(tmp_path / "runs" / "scenes-64-lcm" / "recipe.yaml"), tmp_path / "none") == [
        ["sample", tmp_path / "none", *words[3:]], ["evaluate", tmp_path / "none", "--steps", "1,2,4,8"],
    ]  # fmt: skip
