"""CLIP's kind of figures on planted embeddings, whose scores are closed forms, and on tiny models in folders."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from fewstep.evaluation.measured import Reference
from fewstep.evaluation.prompt_set import PromptSet
from fewstep.models import rewards
from fewstep.models.encoders import load_pretrained_encoder
from fewstep.models.hub import quiet
from fewstep.models.rewards import Aesthetic, ClipScore, open_reward
from fewstep.recipe.load import parse_recipe
from fewstep.recipe.validate import RecipeError
from fewstep.runs.measured_on import _scores, check_networks
from fewstep.scenes64.architecture import build_tokenizer
from fewstep.scenes64.scenes import WORDS

torch.set_num_threads(1)
SIDE = 8
WORDS_FOR = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "grey": (1.0, 1.0, 1.0)}
CAPTIONS = ["red", "green", "grey"] * 4  # not a divisor of a batch of eight
LOOKS = {"red": (0.8, 0.2, 0.2), "green": (0.1, 0.9, 0.3), "grey": (0.5, 0.4, 0.5)}
COLOURS = [LOOKS[caption] for caption in CAPTIONS]
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.3, 0.4])


class Planted:
    """A CLIP whose vector of an image is its mean colour, and of a prompt that of its word, of any length."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=SIDE), text_config=SimpleNamespace(max_position_embeddings=4),
            image_size=SIDE,
        )  # fmt: skip
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def eval(self):
        return self

    def requires_grad_(self, _):
        return self

    def get_image_features(self, pixel_values):
        mean, std = PIXELS
        return 7 * (pixel_values.mean(dim=(2, 3)) * std + mean)

    def get_text_features(self, input_ids):
        return torch.tensor([[3 * x for x in list(WORDS_FOR.values())[i]] for i in input_ids[:, 0].tolist()])

    def __call__(self, pixel_values):
        return self.get_image_features(pixel_values)


def tokens(prompts, **options):
    assert options == {"padding": True, "truncation": True, "max_length": 4, "return_tensors": "pt"}
    return {"input_ids": torch.tensor([[list(WORDS_FOR).index(prompt)] for prompt in prompts])}


def plain(colours):
    """Images of one colour each, [N, 3, 20, 20] in [0, 1]."""
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 20, 20)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.fixture
def planted(monkeypatch):
    """Figures of images of `CAPTIONS`, with planted models in the place of those that a recipe names."""
    clip = ClipScore(Planted(), tokens, PIXELS)
    head = Aesthetic(Planted(), [(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([5.0]))], PIXELS)
    made = {"clip:a/b": clip, "pickscore": clip, "aesthetic:c": head}
    monkeypatch.setattr("fewstep.runs.measured_on.open_reward", lambda name, device, measures: made[name])
    evaluate = parse_recipe({"method": "tcd", "evaluate": {"metrics": list(made)}}).evaluate

    def colours(images):
        return images.mean(dim=(2, 3))

    reference = Reference.of(torch.rand(9, 3, 20, 20), colours)
    prompts = PromptSet(CAPTIONS, colours, reference, scores=_scores(CAPTIONS, evaluate, "cpu"))
    return lambda images: prompts.measure(images).figures(reference)


def test_scores_of_planted_embeddings_are_closed_forms(planted):
    found = planted(plain(COLOURS))
    cosines = [cosine(colour, WORDS_FOR[word]) for colour, word in zip(COLOURS, CAPTIONS, strict=True)]
    assert found["CLIP score"] == found["PickScore"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    ratings = [5 + (2 * r - g + 0.5 * b) / math.sqrt(r * r + g * g + b * b) for r, g, b in COLOURS]
    assert found["aesthetic"] == pytest.approx(sum(ratings) / len(ratings), abs=1e-6)


def test_images_of_other_prompts_agree_less_and_look_the_same(planted):
    right, wrong = planted(plain(COLOURS)), planted(plain(COLOURS[1:] + COLOURS[:1]))
    assert wrong["CLIP score"] < right["CLIP score"] - 0.1
    assert wrong["aesthetic"] == pytest.approx(right["aesthetic"], abs=1e-6)


# ---------------------------------------------------------------- tiny models in folders

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEN = {**SMALL, "image_size": SIDE, "patch_size": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of tiny configs with random weights: CLIP with and without a tokenizer, SigLIP, DINOv2, a ViT."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        SiglipConfig,
        SiglipModel,
        ViTConfig,
        ViTModel,
    )

    root, tokenizer = tmp_path_factory.mktemp("models"), build_tokenizer(WORDS)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 6, "projection_dim": 8,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    torch.manual_seed(0)
    clip = CLIPConfig(text_config=text, vision_config={**SEEN, "projection_dim": 8}, projection_dim=8)
    models = {
        "clip": CLIPModel(clip),
        "mute": CLIPModel(clip),
        "siglip": SiglipModel(SiglipConfig(text_config={**SMALL, "vocab_size": 9}, vision_config=SEEN)),
        "dino": Dinov2Model(Dinov2Config(**SEEN)),
        "vit": ViTModel(ViTConfig(**SEEN), add_pooling_layer=False),  # no weights for the vector that is asked for
    }
    with quiet():
        for name, model in models.items():
            model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "clip")
    return root


@pytest.mark.parametrize("kind", ["clip", "pickscore"])
def test_the_clip_score_of_a_folder_is_transformers_own_cosine(folders, kind):
    """Also of prompts longer than the model reads."""
    from transformers import CLIPModel

    prompts = ["a red circle", "a star", "two large red circles in the middle and a small blue star"]
    images = torch.rand(3, 3, SIDE, SIDE)
    model = CLIPModel.from_pretrained(folders / "clip").eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in CLIP)
    encoded = build_tokenizer(WORDS)(prompts, padding=True, truncation=True, max_length=6, return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded, pixel_values=(images - mean) / std).logits_per_image / model.logit_scale.exp()
    found = open_reward(f"{kind}:{folders / 'clip'}", measures=True)(images * 2 - 1, prompts)
    assert found.tolist() == pytest.approx(logits.diagonal().tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["siglip", "dino", "clip"])
def test_features_by_name_are_those_of_transformers(folders, name):
    """DINOv2's class token, CLIP's and SigLIP's image vectors, on pixels of each kind's own statistics."""
    from transformers import AutoModel

    images, encoder = torch.rand(3, 3, SIDE, SIDE), load_pretrained_encoder(str(folders / name))
    usual = {"siglip": ((0.5,) * 3, (0.5,) * 3), "clip": CLIP,
             "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}[name]  # fmt: skip
    mean, std = (torch.tensor(x)[:, None, None] for x in usual)
    model, pixels = AutoModel.from_pretrained(folders / name).eval(), (images - mean) / std
    with torch.no_grad():
        vision = getattr(model, "vision_model", model)(pixel_values=pixels).pooler_output
    wanted = model.visual_projection(vision) if name == "clip" else vision
    assert torch.allclose(encoder(images, batch_size=2), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "evaluate, said",
    [
        ({"metrics": ["clip"]}, "metrics: The reward 'clip' needs its model: clip:MODEL"),
        ({"metrics": ["clip:nowhere/at/all"]}, "metrics: .* there is no folder nowhere/at/all"),
        ({"metrics": ["clip:~/nowhere"]}, "metrics: .* there is no folder /"),
        ({"metrics": ["clip:{}/mute"]}, "metrics: .* it has no tokenizer"),
        ({"metrics": ["clip:{}/siglip"]}, "metrics: .* lack weights of a CLIPModel"),
        ({"metrics": ["aesthetic"]}, "metrics: The reward 'aesthetic' needs its folder"),
        ({"metrics": ["aesthetic:{}/clip"]}, "metrics: .* cannot be loaded"),
        ({"features": "./nowhere"}, "features: .* there is no folder ./nowhere"),
        ({"features": "{}/vit"}, "features: .* lack weights of a ViTModel, such as pooler.dense.bias"),
        ({"features": "{}/clip/config.json"}, "features: .* cannot be loaded"),
    ],
)
def test_a_network_that_cannot_be_loaded_is_one_sentence(folders, evaluate, said):
    placed = json.loads(json.dumps(evaluate).replace("{}", str(folders)))
    recipe = parse_recipe({"method": "tcd", "evaluate": {"every": 1, **placed}})
    with pytest.raises(RecipeError, match=f"^evaluate.{said}") as error:
        check_networks([recipe])
    assert "\n" not in str(error.value)
    check_networks([recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"every": 0})})])


def test_networks_are_looked_for_before_a_run_begins(folders, tmp_path):
    """By a run, by a chain for all its stages, and in words by a plan."""
    from fewstep.recipe.chain import parse_chain
    from fewstep.runs.chain import run
    from fewstep.runs.foresee import missing_here

    said = "evaluate.metrics: The reward 'clip:./nowhere' cannot be loaded: there is no folder ./nowhere."
    short = {"training": {"steps": 1, "batch_size": 2}, "data": {"size": 8}, "sample": {"teacher_steps": 1}}
    recipe = {"method": "tcd", "evaluate": {"every": 1, "count": 8, "metrics": ["clip:./nowhere"]}, **short}
    first = {"name": "first", "evaluate": {"metrics": []}}
    chain = parse_chain({**recipe, "stages": [first, {"name": "second", "teacher": "first"}]})
    for made in (parse_recipe(recipe), chain):
        with pytest.raises(RecipeError) as error:
            run(made, tmp_path / "run")
        assert str(error.value) == said and not (tmp_path / "run").exists()
        assert said in missing_here(made)


def test_a_figure_has_one_model():
    from fewstep.runs.measured_on import check_measured

    recipe = parse_recipe({"method": "tcd", "evaluate": {"every": 1, "metrics": ["clip:a", "clip:b"]}})
    with pytest.raises(RecipeError, match=r"^evaluate.metrics: clip is there twice"):
        check_measured(recipe)
    assert rewards.short_name("clip:a/b") == "clip"
