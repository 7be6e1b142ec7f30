"""LoRA files as trainers and programs write them, beside the change of each weight by formulas of our own in float64.

The formulas are written from the papers and from the definitions that LyCORIS and ComfyUI publish, apart from the code
under test: each loops over what the code writes as one product.
"""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import save_file

from fewstep.models.families import find_family
from fewstep.models.lora_files import add_loras
from tests.models.pipelines import build

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
K, OUT = Q.replace("to_q", "to_k"), Q.replace("to_q", "to_out.0")
CONV, NORM = "down_blocks.0.resnets.0.conv1", Q.replace("attn1.to_q", "norm1")
FLUX_Q, FLUX_ONE = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0"
WORDS = "encoder.layers.0.mlp.fc1"


@functools.cache
def weights(name):
    """part.parameter -> its value in float64, of a tiny pipeline."""
    family = find_family(build(name))
    modules = {part: module for part, module in family.lora_parts.items() if module is not None}
    return {f"{part}.{n}": p.detach().double() for part, m in modules.items() for n, p in m.named_parameters()}


def weight(name, layer, kind="weight"):
    return weights(name)[f"{find_family(build(name)).part}.{layer}.{kind}"]


def copied(name):
    """The parts of a tiny pipeline that LoRA files adapt, to be changed."""
    family = find_family(build(name))
    return {part: None if m is None else copy.deepcopy(m) for part, m in family.lora_parts.items()}


_shared = functools.cache(copied)


def named(parts):
    """part.parameter -> the parameter."""
    return {f"{part}.{n}": p for part, m in parts.items() if m is not None for n, p in m.named_parameters()}


def effect(name, path, scale=1.0, parts=None):
    """part.parameter -> its change by a LoRA file, of all parameters that change; undone afterwards on shared parts."""
    mine = parts or _shared(name)
    before = {key: p.clone() for key, p in named(mine).items()}
    add_loras(mine, [(path, scale)])
    after = named(mine)
    assert after.keys() == before.keys()
    changes = {key: p.double() - before[key].double() for key, p in after.items() if not torch.equal(p, before[key])}
    for key in changes if parts is None else ():
        after[key].copy_(before[key])
    return changes


def refusal(name, path):
    """The sentence by which a LoRA file is refused, after which no parameter of any part has changed."""
    parts = _shared(name)
    with pytest.raises(ValueError) as error:
        add_loras(parts, [(path, 1.0)])
    original = named(find_family(build(name)).lora_parts)
    assert all(torch.equal(p, original[key]) for key, p in named(parts).items())
    return str(error.value)


def worst(found, wanted):
    """Largest gap of all changes, in parts of the largest wanted one."""
    size = max(t.abs().max().item() for t in wanted.values())
    assert size > 0
    gaps = [(found.get(k, torch.zeros(())) - wanted.get(k, torch.zeros(()))).abs().max() for k in found | wanted]
    return max(gap.item() for gap in gaps) / size


def drawn(*shape, seed=0, scale=0.1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 97 * sum(shape))) * scale


def pair(name, layer, rank=4, seed=0):
    """A and B for a layer."""
    out, into, *kernel = weight(name, layer).shape
    return drawn(rank, into, *kernel, seed=seed), drawn(out, rank, *[1] * len(kernel), seed=seed + 1)


def kohya_name(layer, prefix="lora_unet_"):
    return prefix + layer.replace(".", "_")


def kohya(layer, a, b, alpha=None, prefix="lora_unet_"):
    name = kohya_name(layer, prefix)
    more = {} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))}
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, **more}


def peft(layer, a, b, prefix="unet.", down="lora_A.weight", up="lora_B.weight"):
    return {f"{prefix}{layer}.{down}": a, f"{prefix}{layer}.{up}": b}


def header(**settings):
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}


def write(path, tensors, metadata=None):
    """The file, its name not ours; tensors that share memory are copied."""
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    return path


# ---------------------------------------------------------------- formulas


def low_rank(a, b, scale=1.0):
    """sum_r B_or A_ri..., term by term."""
    a, b = a.double(), b.double().flatten(1)
    return scale * sum(b[:, r].reshape(-1, *[1] * (a.ndim - 1)) * a[r][None] for r in range(len(a)))


def cp(down, mid, up):
    """sum_rt B_or M_rtkl A_ti, term by term."""
    down, mid, up = down.double().flatten(1), mid.double(), up.double().flatten(1)
    terms = [up[:, r, None, None, None] * mid[r, t][None, None] * down[t][None, :, None, None]
             for r in range(mid.shape[0]) for t in range(mid.shape[1])]  # fmt: skip
    return sum(terms)


def kron(one, two):
    """Blocks one_ij two, side by side and one below the other; kernels stay those of ``two``."""
    one, two = one.double(), two.double()
    return torch.cat([torch.cat([value * two for value in row], dim=1) for row in one], dim=0)


def kernels(at):
    """[out, in, 3, 3] of its matrices at each place of the kernel."""
    return torch.stack([torch.stack([at(i, j) for j in range(3)], dim=-1) for i in range(3)], dim=-2)


def decomposed(w, change, size, axis):
    """DoRA, row by row (axis 0) or column by column (1)."""
    merged = (w + change).transpose(0, axis)
    lines = [line * (m / line.square().sum().sqrt()) for line, m in zip(merged, size.double().flatten(), strict=True)]
    return torch.stack(lines).transpose(0, axis) - w


def split(change, *layers):
    """Rows of a fused layer as the changes of its layers, which are of equal size."""
    return {f"{layer}.weight": rows for layer, rows in zip(layers, change.chunk(len(layers)), strict=True)}
