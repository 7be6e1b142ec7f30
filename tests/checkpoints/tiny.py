"""Published files in miniature: LoRAs in several layouts and whole networks for a tiny Stable Diffusion pipeline."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.models.families import UNET_LORA_TARGETS


def lora_of(unet, rank=4, seed=0, scale=0.3, targets=UNET_LORA_TARGETS):
    """layer -> (A, B) of a random LoRA, by hand."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.endswith(targets):
            out, into, *kernel = layer.weight.shape
            a = torch.randn(rank, into, *kernel, generator=generator) * (into**-0.5)
            b = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * scale * rank**-0.5
            made[name] = (a, b)
    return made


def kohya(lora, alpha):
    """As kohya's trainer writes it: B is larger by rank / alpha, alpha in a tensor of its own."""
    found = {}
    for name, (a, b) in lora.items():
        key = "lora_unet_" + name.replace(".", "_")
        found |= {
            f"{key}.lora_down.weight": a,
            f"{key}.lora_up.weight": b * (a.shape[0] / alpha),
            f"{key}.alpha": torch.tensor(float(alpha)),
        }
    return found


def peft(lora):
    return {f"unet.{n}.lora_{k}.weight": t for n, ab in lora.items() for k, t in zip("AB", ab, strict=True)}


def added(unet, lora, scale=1.0):
    """W + scale B A of every layer, by hand, as a state dict."""
    weights = {name: t.clone() for name, t in unet.state_dict().items()}
    for name, (a, b) in lora.items():
        weights[f"{name}.weight"] += scale * (b.flatten(1) @ a.flatten(1)).view_as(weights[f"{name}.weight"])
    return weights
