"""What an export says of itself to the Hub and to its readers: never a path of this machine, nothing unescaped."""

from __future__ import annotations

import ast
import json
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from fewstep.export.hub_card import hub_name, licence_words, plain, shown
from fewstep.export.readme import code, measured, readme
from fewstep.models.families.flux import Flux
from fewstep.models.families.unet import StableDiffusion
from fewstep.sampling.diffusers_schedulers import SchedulerPlan
from fewstep.students.card import Card

CARD = Card("lcm", "lcm", 4, "lora", "x", rank=4, steps=300)
PLAN = SchedulerPlan("LCMScheduler", {}, {"guidance_scale": 1.0})
NASTY = (
    '--- \n# Buy `this` <script>alert("1")</script>\n```\nlicense: mit [x](y) *a* _b_ | ~~c~~ & \u2028 "q" \\ \udcff'
)


def text_of(base, folder, card=CARD, to="lora", title="mine", image="", lines="pass"):
    return readme(to, title, base, lines, card, "4 steps", folder / "student", "Read back.", ["One remark."], image)


def front(text):
    """The metadata as the Hub's own library reads it, and the rest."""
    made = ModelCard(text)
    assert yaml.safe_load(made.content.split("---\n")[1]) is not None
    return made.data.to_dict(), made.text


@pytest.mark.parametrize("base, licence", [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", {"license": "creativeml-openrail-m"}),
    ("stabilityai/stable-diffusion-xl-base-1.0", {"license": "openrail++"}),
    ("black-forest-labs/FLUX.1-schnell", {"license": "apache-2.0"}),
    ("black-forest-labs/FLUX.1-dev", {
        "license": "other", "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev"}),
    ("stabilityai/stable-diffusion-3.5-large", {
        "license": "other", "license_name": "stabilityai-ai-community",
        "license_link": "https://huggingface.co/stabilityai/stable-diffusion-3.5-large"}),
    ("some.body/a-model_2", {
        "license": "other", "license_name": "see-base-model", "license_link": "https://huggingface.co/some.body/a-model_2"}),
    ("black-forest-labs/FLUX.1-dev+style/lora", {
        "license": "other", "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev"}),
])  # fmt: skip
@pytest.mark.parametrize("to, relation", [("lora", "adapter"), ("merged", "finetune"), ("diffusers", "finetune")])
def test_a_model_of_the_hub_is_the_base_model(base, licence, to, relation, tmp_path):
    data, _ = front(text_of(base, tmp_path, to=to))
    assert {k: v for k, v in data.items() if k.startswith("license")} == licence
    assert data["base_model"] == base.split("+")[0] and data["base_model_relation"] == relation
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"few-step", "fewstep", "lcm", "text-to-image"} <= set(data["tags"])
    assert ("lora" in data["tags"]) == (to == "lora")


@pytest.mark.parametrize("name", ["models/sd15", "deep/er/models/sd15", "file.safetensors", "own/file.safetensors"])
def test_a_local_model_is_never_named_by_its_path(name, tmp_path, monkeypatch):
    """Not even one whose relative path looks like a hub name."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"") if place.suffix else place.mkdir()
    for base in (name, str(place), f"{name}+style.safetensors"):
        data, text = front(text_of(base, tmp_path))
        assert not data.keys() & {"base_model", "base_model_relation"}
        assert data["license"] == "other" and data["license_link"] == "LICENSE.md"
        assert str(tmp_path) not in str(data) + text and f"derivative of {place.name}" in text
        assert str(tmp_path) not in licence_words(base) and place.name in shown(base)


def test_the_shipped_model_is_named_but_no_base_model(tmp_path):
    data, text = front(text_of("scenes-64", tmp_path))
    assert data["license"] == "apache-2.0" and "base_model" not in data and "scenes-64 in 4 steps" in text
    assert hub_name("scenes-64") == "" and licence_words("scenes-64+style.safetensors") == "apache-2.0"


def test_the_samples_are_the_widget(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sample: {prompts: ['a red star', \"a 'blue': cat\"]}\n")
    data, text = front(text_of("a/b", tmp_path, image="samples.png"))
    assert data["widget"] == [{"text": "a red star; a 'blue': cat", "output": {"url": "samples.png"}}]
    assert "![samples](samples.png)" in text
    for broken in ("sample: 3", "[", "sample: {prompts: 7}", ""):
        (tmp_path / "recipe.yaml").write_text(broken)
        assert front(text_of("a/b", tmp_path, image="samples.png"))[0]["widget"][0]["text"] == "samples"
    assert "widget" not in front(text_of("a/b", tmp_path))[0]


def test_nothing_of_a_strangers_card_is_markup(tmp_path):
    """Method, title, base and names of figures come from files that anybody may have written."""
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 300, NASTY: 1.5}) + "\n")
    text = text_of(NASTY, tmp_path, replace(CARD, method=NASTY), title=NASTY, lines='x = "```"\n````')
    data, body = front(text)
    assert data["license"] == "other" and any("license: mit" in tag and "\n" not in tag for tag in data["tags"])
    text.encode("utf-8")
    before, fenced, after = body.split("`````")
    assert fenced == 'python\nx = "```"\n````\n'
    for part in (before, after):
        for mark in ("`", "<", ">", "*", "[x]", "|", "~"):
            assert part.count(mark) == part.count("\\" + mark), mark
        assert sum(line.startswith("# ") for line in part.splitlines()) == (part is before)
        assert not any(line.startswith(("---", "```", "license")) for line in part.splitlines())
    assert plain("a_b") == r"a\_b" and plain("a\nb") == "a b"


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_the_code_holds_any_name(to):
    class Family:
        base, part = StableDiffusion, "unet"

    for name in ('a"b', "a\\b", "a\nb", "ü 猫 \U0001f408", "\udcff", '"""', "a'b"):
        tree = ast.parse(code(to, name, name, Family(), CARD, PLAN))
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert strings.count(name) == (2 if to == "lora" else 1)


def test_the_figures_are_those_of_these_weights(tmp_path):
    """`keep_best` keeps an earlier student: the last evaluation is another one's."""
    lines = [{"step": 200, "FD": 9.0}, {"step": 300, "FD": 7.25, "note": "x"}, {"step": 400, "FD": 8.5}]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5')
    for folder in ("student", "best"):
        assert measured(tmp_path / folder, CARD) == "At step 300 of its training, on unseen prompts: FD 7.25."
    with open(tmp_path / "evaluations.jsonl", "w") as file:
        file.write(json.dumps({"step": 300, "FD": 7.25, "on": "8 captions held out of training, against *x*"}) + "\n")
        file.write(json.dumps({"step": 400, "FD": 8.5}) + "\n")
    assert "on 8 captions held out of training, against \\*x\\*: FD 7.25." in measured(tmp_path / "student", CARD)
    assert "At step 400" in measured(tmp_path / "student", replace(CARD, steps=400))
    for source, card in ((tmp_path / "student", replace(CARD, steps=350)), (tmp_path / "another", CARD)):
        assert measured(source, card).startswith("These weights were not measured")


def test_the_licence_of_a_family_is_found_under_its_name():
    assert licence_words("black-forest-labs/FLUX.1-dev") == Flux.licences["black-forest-labs/FLUX.1-dev"]
    assert licence_words("a/b") == "that of a/b; read its card"
