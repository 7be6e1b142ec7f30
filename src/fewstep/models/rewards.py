"""Reward models: how much people like an image, given its prompt; frozen, with a gradient to the image.

==================  ==================================================================================================
name                what it is
==================  ==================================================================================================
``FILE``            a small one of scenes-64, trained by ``fewstep reward train`` (`SmallReward`)
``clip:PLACE``      agreement with the prompt by a CLIP model from a folder or the hub (CLIP score)
``pickscore``       PickScore (Kirstain et al. 2023, arXiv 2305.01569) from the hub; ``pickscore:PLACE`` from a folder
``aesthetic:PLACE`` LAION's aesthetic predictor: PLACE holds a CLIP model and its head, ``aesthetic.safetensors``
==================  ==================================================================================================

Each takes images as in its own training: clamped to [0, 1] first, because an image file holds nothing beyond, then
resized and normalised, all differentiable. ImageReward and HPSv2 are missing: their weights are pickles of networks
that transformers does not have.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.diffusion.schedule import working
from fewstep.models.detector import DetectorNetwork
from fewstep.models.encoders import EncoderNetwork, load_encoder
from fewstep.models.pretrained import from_pretrained, loading, pixel_statistics, pooled, read_network

PICKSCORE, PICKSCORE_WORDS = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HEAD_FILE = "aesthetic.safetensors"
TRUNKS: dict[str, Callable[[Mapping[str, int]], EncoderNetwork | DetectorNetwork]] = {
    "encoder": EncoderNetwork,
    "detector": DetectorNetwork,
}
_HEADER = "fewstep_reward"
_TRAIN = "train one by 'fewstep reward train'"


# ---------------------------------------------------------------- by name


def open_reward(name: str, device: str = "cpu", measures: bool = False) -> SmallReward | ClipScore | Aesthetic:
    """The reward model of that name (see the table above); on the device "meta" it has shapes alone.

    Args:
        measures: it only measures. A model on the detector's trunk may, and must not serve in a loss.

    Raises:
        ValueError: one sentence when it is not there, is no reward model, or must not be trained on.
    """
    kind, _, place = name.partition(":")
    place = os.path.expanduser(place)  # pathlib would take ./ off
    if kind in ("clip", "pickscore"):
        return ClipScore.load(kind, place, device)
    if kind == "aesthetic":
        return Aesthetic.load(place, device)
    if device == "meta" and not Path(name).exists():  # a plan may be made before the reward model is trained
        return SmallReward(RewardNetwork(About("encoder", load_encoder().heads))).to("meta")
    reward = SmallReward(load_reward(Path(name))).to(device)
    if reward.network.about.trunk == "detector" and not measures:
        raise ValueError(
            f"The reward model {name} is built on the detector, which measures and must never serve in a loss: take it "
            "as held_out, and train another one for the loss."
        )
    return reward


def short_name(name: str) -> str:
    """What a reward is called in a log: its kind, or its file without the ending."""
    kind = name.partition(":")[0]
    return kind if kind in ("clip", "pickscore", "aesthetic") else re.sub(r"\W", "_", Path(name).stem)


# ---------------------------------------------------------------- the small one of scenes-64


@dataclass(frozen=True)
class About:
    """What a `RewardNetwork` is made of.

    Attributes:
        trunk: "encoder" or "detector", whose predictions it reads.
        heads: attributes that the trunk predicts, and how many values each can take.
    """

    trunk: Literal["encoder", "detector"]
    heads: Mapping[str, int]


class RewardNetwork(nn.Module):
    """The reward of an image of scenes-64 from a trained network's features, independent of its prompt.

    The trunk is frozen. Its predictions are averaged over the cells where it sees shapes, the largest value of every
    attribute over all cells is kept too, and a linear form reads both. The reward is in standard deviations from the
    mean of the images that it was trained on.
    """

    def __init__(self, about: About) -> None:
        super().__init__()
        self.about = about
        self.trunk = TRUNKS[about.trunk](about.heads).requires_grad_(False)
        seen = 1 + 2 * sum(about.heads.values())
        self.taste = nn.Linear(seen, 1)
        # means (row 0) and standard deviations (row 1) of the features; `scale` has those of the reward
        self.usual = nn.Parameter(torch.ones(2, seen), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor([0.0, 1.0]), requires_grad=False)

    def seen(self, images: Tensor) -> Tensor:
        """[B, F] of images [B, 3, 64, 64] in [0, 1]: how many shapes there are, mean and maximum of every value."""
        predicted = self.trunk(images)
        there = predicted["near"].sigmoid().flatten(1)
        values = torch.cat([predicted[name].softmax(dim=-1) for name in self.about.heads], dim=-1).flatten(1, 2)
        weighted = there[..., None] * values
        mass = there.sum(dim=1, keepdim=True)
        return torch.cat([mass, weighted.sum(dim=1) / mass.clamp_min(1e-6), weighted.amax(dim=1)], dim=1)

    def like(self, seen: Tensor) -> Tensor:
        """Numbers [B], before they are scaled, of what `seen` gives."""
        return cast(Tensor, self.taste((seen - self.usual[0]) / self.usual[1]).squeeze(1))

    def forward(self, images: Tensor) -> Tensor:
        """[B] of images [B, 3, 64, 64] in [0, 1]."""
        return (self.like(self.seen(images)) - self.scale[0]) / self.scale[1]


class SmallReward:
    """A `RewardNetwork` as losses ask it (`fewstep.models.helpers.Reward`)."""

    def __init__(self, network: RewardNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    def to(self, device: str) -> SmallReward:
        self.network.to(device)
        return self

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        images = _in_range(images).to(self.network.scale.dtype)
        if images.shape[-1] != 64 or images.shape[-2] != 64:
            images = F.interpolate(images, (64, 64), mode="bicubic", antialias=True)
        return cast(Tensor, self.network(images))


def load_reward(path: Path) -> RewardNetwork:
    """The network in a file of `fewstep reward train`.

    Raises:
        ValueError: one sentence when it is missing, damaged or something else.
    """
    if not path.is_file():
        raise ValueError(
            f"There is no reward model '{path}': give a file, clip:MODEL, pickscore or aesthetic:FOLDER, or {_TRAIN}."
        )

    def build(metadata: Mapping[str, str]) -> RewardNetwork:
        about = json.loads(metadata[_HEADER])
        trunk: Any = "detector" if about["trunk"] == "reader" else about["trunk"]  # its former name
        return RewardNetwork(About(trunk, {str(name): int(count) for name, count in about["heads"].items()}))

    return read_network(path, build, f"The file {path} does not hold a reward model: {_TRAIN}.")


def reward_file(network: RewardNetwork) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the file that `load_reward` reads: the trunk in float16, like its own file."""
    state = network.state_dict()
    halved = {k: t.half() if k.startswith("trunk.") else t for k, t in state.items()}
    return {k: t.cpu().contiguous() for k, t in halved.items()}, {_HEADER: json.dumps(asdict(network.about))}


# ---------------------------------------------------------------- CLIP's kind, through transformers


class ClipScore:
    """The cosine between image and prompt of a CLIP model; PickScore is one that was trained on people's choices.

    Official PickScores are this times exp(logit_scale), about 100; tables give them as here, 0.2 to 0.24.
    """

    def __init__(self, model: Any, tokenizer: Any, pixels: tuple[Tensor, Tensor]) -> None:
        self.model, self.tokenizer, self.pixels = model.eval().requires_grad_(False), tokenizer, pixels

    @classmethod
    def load(cls, kind: str, place: str, device: str = "cpu") -> ClipScore:
        """From a folder or a hub name; the published PickScore comes without a tokenizer, which is CLIP-H's.

        Args:
            kind: "clip" or "pickscore", which has a ``place`` of its own where none is given.

        Raises:
            ValueError: one sentence when it is not there, or is no CLIP model.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        words = place
        if kind == "pickscore":
            place = place or PICKSCORE
            own = any((Path(place) / file).is_file() for file in ("tokenizer.json", "vocab.json"))
            words = place if own else PICKSCORE_WORDS
        if not place:
            raise ValueError("The reward 'clip' needs its model: clip:MODEL, a folder or a hub name.")
        with loading(f"The reward '{kind}:{place}'"):
            model = from_pretrained(CLIPModel, CLIPConfig, place, device)
            tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
            if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # transformers makes up an empty one
                raise ValueError("it has no tokenizer.")
            return cls(model, tokenizer, pixel_statistics(place, "clip"))

    @property
    def network(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] cosines, for images [B, 3, H, W] from -1 to 1 and B prompts."""
        config = self.model.config
        pixels = as_clip_sees(images, config.vision_config.image_size, *self.pixels)
        longest = config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        of_image = pooled(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))
        with torch.no_grad():  # padding comes after the token that is read, and the text encoder is causal: no mask
            of_prompt = pooled(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.model.device)))
        return F.cosine_similarity(working(of_image), working(of_prompt), dim=1)


class Aesthetic:
    """LAION's aesthetic predictor, about 1 to 10: linear layers without activations on CLIP's unit image vector.

    Args:
        model: CLIPVisionModelWithProjection.
        layers: (weight, bias) of each.
    """

    def __init__(self, model: Any, layers: Sequence[tuple[Tensor, Tensor]], pixels: tuple[Tensor, Tensor]) -> None:
        self.model, self.layers, self.pixels = model.eval().requires_grad_(False), list(layers), pixels

    @classmethod
    def load(cls, place: str, device: str = "cpu") -> Aesthetic:
        """From a folder with a CLIP model and ``aesthetic.safetensors``: the published head under its own names
        (``layers.0.weight``, ``layers.0.bias``, ``layers.2.weight``, ...).

        Raises:
            ValueError: one sentence when one of them is not there.
        """
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        what = f"The reward 'aesthetic:{place}'"
        if not place:
            raise ValueError(f"The reward 'aesthetic' needs its folder: aesthetic:FOLDER, with CLIP and {HEAD_FILE}.")
        with loading(what):
            layers = _layers(load_file(Path(place) / HEAD_FILE, device="cpu"))
            model = from_pretrained(CLIPVisionModelWithProjection, CLIPVisionConfig, place, device)
            pixels = pixel_statistics(place, "clip")
        width = model.config.projection_dim
        for weight, _ in layers:
            if weight.shape[1] != width:
                raise ValueError(f"{what} has a head that does not fit its CLIP model.")
            width = weight.shape[0]
        if width != 1:
            raise ValueError(f"{what} has a head that gives {width} numbers, not one.")
        on_device = [(weight.to(device), bias.to(device)) for weight, bias in layers]
        return cls(model, on_device, pixels)

    @property
    def network(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] scores, for images [B, 3, H, W] from -1 to 1; prompts are ignored."""
        pixels = as_clip_sees(images, self.model.config.image_size, *self.pixels)
        x = F.normalize(working(pooled(self.model(pixel_values=pixels.to(self.model.dtype)))), dim=1)
        for weight, bias in self.layers:
            x = F.linear(x, weight.to(x), bias.to(x))
        return x.squeeze(1)


def as_clip_sees(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """CLIP's own transform with a gradient: images [B, 3, H, W] from -1 to 1 -> pixels [B, 3, size, size].

    The shorter side is resized to ``size`` by antialiased bicubic, the middle square is kept.
    """
    images = _in_range(images)
    height, width = images.shape[-2:]
    short = min(height, width)
    sides = (int(size * height / short), int(size * width / short))
    images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in sides)
    images = images[..., top : top + size, left : left + size]
    return (images - mean.to(images)[:, None, None]) / std.to(images)[:, None, None]


def _in_range(images: Tensor) -> Tensor:
    """From -1 ... 1 and beyond to [0, 1], as files hold them; the gradient is 0 beyond."""
    return (images / 2 + 0.5).clamp(0, 1)


def _layers(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A head's layers in their order."""
    numbers = sorted(int(key.split(".")[1]) for key in tensors if re.fullmatch(r"layers\.\d+\.weight", key))
    found = [(tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in numbers]
    if not found or len(tensors) != 2 * len(found) or any(weight.ndim != 2 for weight, _ in found):
        raise ValueError(f"{HEAD_FILE} holds no layers.<n>.weight and layers.<n>.bias.")
    return found
