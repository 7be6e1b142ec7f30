"""Reward models: CLIP's kind on tiny random configs against transformers' own processing, the small one by hand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.data.files import save_tensors
from fewstep.models.detector import DetectorNetwork
from fewstep.models.encoders import load_encoder
from fewstep.models.rewards import (
    HEAD_FILE,
    About,
    RewardNetwork,
    as_clip_sees,
    load_reward,
    open_reward,
    reward_file,
    short_name,
)
from fewstep.scenes64.architecture import build_tokenizer
from fewstep.scenes64.scenes import WORDS, Scenes

torch.set_num_threads(1)
SIDE = 20
PROMPTS = ("a red circle", "two large shapes and more", "a star")
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
              patch_size=5, projection_dim=6)  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP with random weights and a tokenizer, in a folder."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(WORDS)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                vocab_size=len(tokenizer), max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, projection_dim=6)  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory):
    """A vision CLIP with random weights and a head of three layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("aesthetic")
    torch.manual_seed(1)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    widths = {0: (4, 6), 2: (3, 4), 10: (1, 3)}  # in the order of numbers, not of names
    head = {f"layers.{n}.weight": torch.randn(*shape) for n, shape in widths.items()}
    head |= {f"layers.{n}.bias": torch.randn(shape[0]) for n, shape in widths.items()}
    save_file(head, folder / HEAD_FILE)
    return folder


def pictures(height=26, width=33):
    """Three scenes, -1 ... 1, as files hold them."""
    images = Scenes(2, size=width).render(range(3)).images[:, :height]
    return images, torch.from_numpy(images.copy()).permute(0, 3, 1, 2).double() / 127.5 - 1


def processed(images):
    """What transformers' own processor makes of picture files: [3, 3, SIDE, SIDE]."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(("height", "width"), [(26, 33), (33, 26), (33, 33), (14, 17)])
def test_clip_sees_pictures_as_its_own_processor_shows_them(clip, height, width):
    """Up to the processor's rounding to 8 bits between its two passes and at the end; upright, flat or small."""
    side = max(height, width)
    images = Scenes(2, size=side).render(range(3)).images[:, :height, :width]
    values = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    reward = open_reward(f"pickscore:{clip}")
    apart = (as_clip_sees(values, SIDE, *reward.pixels) - processed(images)).abs() * 0.26 * 255
    assert apart.mean() < 0.5 and apart.max() < 10  # in steps of 8 bits; at hard edges it cuts overshoots


def test_pickscore_is_the_cosine_of_picture_and_prompt(clip):
    reward, (images, values) = open_reward(f"pickscore:{clip}"), pictures()
    with torch.no_grad():
        shown = reward.model.vision_model(pixel_values=processed(images)).pooler_output @ (
            reward.model.visual_projection.weight.T
        )
        said = []
        for prompt in PROMPTS:  # one by one: no padding
            tokens = build_tokenizer(WORDS)(prompt, return_tensors="pt")["input_ids"]
            hidden = reward.model.text_model(input_ids=tokens).last_hidden_state[0, -1]
            said.append(reward.model.text_projection.weight @ hidden)
        wanted = [float(a @ b / a.norm() / b.norm()) for a, b in zip(shown, said, strict=True)]
    found = reward(values.float(), PROMPTS)
    assert found.tolist() == pytest.approx(wanted, abs=2e-3)
    other = reward(values.float(), PROMPTS[1:] + PROMPTS[:1])
    assert (other - found).abs().min() > 1e-3  # the prompt counts


def test_aesthetic_is_a_chain_of_layers_on_a_unit_vector(aesthetic):
    reward, (images, values) = open_reward(f"aesthetic:{aesthetic}"), pictures()
    with torch.no_grad():
        x = reward.model(pixel_values=processed(images)).image_embeds.double().numpy()
    head = {key: t.double().numpy() for key, t in load_file(aesthetic / HEAD_FILE).items()}
    x = x / np.sqrt((x**2).sum(axis=1, keepdims=True))
    for n in (0, 2, 10):
        x = x @ head[f"layers.{n}.weight"].T + head[f"layers.{n}.bias"]
    assert reward(values.float(), PROMPTS).tolist() == pytest.approx(x[:, 0].tolist(), abs=0.02)


@pytest.mark.parametrize("kind", ["pickscore", "aesthetic", "small"])
def test_gradients_reach_what_a_file_could_hold_and_stay_in_no_weight(kind, clip, aesthetic, small):
    name = {"pickscore": f"pickscore:{clip}", "aesthetic": f"aesthetic:{aesthetic}", "small": str(small)}[kind]
    reward, (_, values) = open_reward(name), pictures(33, 33)
    x = (1.3 * values.float()).requires_grad_()
    rewards = reward(x, PROMPTS)
    assert rewards.shape == (3,) and torch.equal(rewards, reward(x.detach().clamp(-1, 1), PROMPTS))
    (slope,) = torch.autograd.grad(rewards.sum(), x)
    outside = x.detach().abs() > 1
    assert outside.any() and (slope[outside] == 0).all() and (slope[~outside] != 0).float().mean() > 0.5
    assert all(p.grad is None and not p.requires_grad for p in reward.network.parameters())


def test_on_meta_there_are_shapes_alone(clip, aesthetic, small):
    x = torch.empty(3, 3, 40, 40, device="meta")
    for name in (f"pickscore:{clip}", f"aesthetic:{aesthetic}", str(small), "not/there/yet.safetensors"):
        reward = open_reward(name, "meta")
        assert reward(x, PROMPTS).shape == (3,) and all(p.is_meta for p in reward.network.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head: head.clear(), "holds no layers"),
        (lambda head: head.pop("layers.2.bias"), "cannot be loaded"),
        (lambda head: head.update(extra=torch.ones(1)), "holds no layers"),
        (lambda head: head.update({"layers.2.weight": torch.ones(3, 5)}), "does not fit its CLIP model"),
        (lambda head: [head.pop(f"layers.10.{part}") for part in ("weight", "bias")], "gives 3 numbers, not one"),
    ],
)
def test_a_head_that_is_none_is_one_sentence(aesthetic, tmp_path, change, said):
    for file in aesthetic.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    head = load_file(aesthetic / HEAD_FILE)
    change(head)
    save_file(head, tmp_path / HEAD_FILE)
    with pytest.raises(ValueError, match="aesthetic:") as error:
        open_reward(f"aesthetic:{tmp_path}")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pickscore:./nowhere", "aesthetic:./nowhere", "aesthetic", "nowhere.safetensors"])
def test_a_model_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ValueError, match=r"reward") as error:
        open_reward(name)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the small one


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small reward with a random taste on the shipped encoder, in a file."""
    trunk, path = load_encoder(), tmp_path_factory.mktemp("small") / "taste.safetensors"
    torch.manual_seed(3)
    network = RewardNetwork(About("encoder", trunk.heads))
    network.trunk.load_state_dict(trunk.state_dict())
    with torch.no_grad():
        network.usual.copy_(torch.rand(2, network.usual.shape[1]) + 0.1)
        network.scale.copy_(torch.tensor([0.3, 2.0]))
    save_tensors(path, *reward_file(network))
    return path


def test_the_small_reward_by_hand(small):
    """Cell by cell, from what the encoder tells."""
    trunk, reward = load_encoder(), open_reward(str(small))
    state = load_file(small)
    images = Scenes(2).render(range(3)).images
    values = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    told = {key: t.double() for key, t in trunk(values / 2 + 0.5).items()}
    for i, found in enumerate(reward(values, PROMPTS).tolist()):
        mass, mean, most = 0.0, 0.0, torch.zeros(21, dtype=torch.float64)
        for row in range(8):
            for column in range(8):
                sure = 1 / (1 + math.exp(-float(told["near"][i, row, column])))
                parts = [told[name][i, row, column].exp() for name in trunk.heads]
                value = torch.cat([part / part.sum() for part in parts])
                mass, mean, most = mass + sure, mean + sure * value, torch.maximum(most, sure * value)
        seen = torch.cat([torch.tensor([mass]).double(), mean / mass, most])
        x = (seen - state["usual"][0]) / state["usual"][1]
        like = float(state["taste.weight"][0].double() @ x + state["taste.bias"][0])
        assert found == pytest.approx((like - 0.3) / 2.0, abs=1e-4)
    large = torch.nn.functional.interpolate(values, scale_factor=2, mode="nearest")
    assert (reward(large, PROMPTS) - reward(values, PROMPTS)).abs().max() < 1.0  # any size is brought to 64


def test_what_measures_is_refused_in_a_loss(tmp_path):
    heads = load_encoder().heads
    network = RewardNetwork(About("detector", heads))
    assert isinstance(network.trunk, DetectorNetwork) and not any(p.requires_grad for p in network.trunk.parameters())
    save_tensors(tmp_path / "judge.safetensors", *reward_file(network))
    name = str(tmp_path / "judge.safetensors")
    assert open_reward(name, measures=True).network.about.trunk == "detector"
    with pytest.raises(ValueError, match="is built on the detector, which measures and must never serve in a loss"):
        open_reward(name)
    tensors, header = reward_file(network)
    former = {key: text.replace('"detector"', '"reader"') for key, text in header.items()}  # files of former versions
    save_tensors(tmp_path / "former.safetensors", tensors, former)
    with pytest.raises(ValueError, match="is built on the detector"):
        open_reward(str(tmp_path / "former.safetensors"))


def test_a_file_that_is_no_reward_is_one_sentence(small, tmp_path):
    with pytest.raises(ValueError, match=r"There is no reward model '.*': give a file, clip:MODEL, pickscore or"):
        load_reward(tmp_path / "none.safetensors")
    path, tensors = tmp_path / "bad.safetensors", load_file(small)
    about = {"fewstep_reward": json.dumps({"trunk": "encoder", "heads": load_encoder().heads})}
    save_tensors(path, tensors, about)
    assert load_reward(path).about.trunk == "encoder"
    bad = [
        (tensors, None),
        (tensors, {"fewstep_reward": "{"}),
        (tensors, {"fewstep_reward": "[]"}),
        (tensors, {"fewstep_reward": json.dumps({"trunk": "os", "heads": {}})}),
        (tensors, {"fewstep_reward": json.dumps({"trunk": "encoder", "heads": {"shape": "x"}})}),
        ({key: t for key, t in tensors.items() if key != "scale"}, about),
        ({**tensors, "scale": torch.ones(3)}, about),
    ]
    for content, header in bad:
        save_tensors(path, content, header)
        with pytest.raises(ValueError, match="does not hold a reward model"):
            load_reward(path)
    path.write_bytes(small.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold a reward model"):
        load_reward(path)


def test_short_names():
    assert [short_name(n) for n in ("pickscore:a/b", "aesthetic:c", "a/b-c.safetensors")] == [
        "pickscore", "aesthetic", "b_c",
    ]  # fmt: skip
