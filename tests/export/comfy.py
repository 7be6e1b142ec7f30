"""Which LoRA names ComfyUI knows: for each, the weight of the original checkpoint that it would change.

ComfyUI numbers a UNet's blocks as the original code does and derives diffusers' names from those numbers. Written down
here from the structure of the original networks, with no look at diffusers' modules.
"""

from __future__ import annotations

RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}  # fmt: skip
INSIDE = [f"attn{i}.to_{k}" for i in (1, 2) for k in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]

SD15 = {"depth": (1, 1, 1, 0), "mid": 1}
SDXL = {"depth": (0, 2, 10), "mid": 10}


def unet_names(depth, mid, res_blocks=2):
    """``lora_unet_...`` -> weight of the original UNet; ``depth`` is the transformers' at each resolution."""
    found = {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}

    def resnet(name, place):
        for mine, theirs in RESNET.items():
            found[f"{name}.{mine}"] = f"{place}.{theirs}"

    def attention(name, place, blocks):
        for part in ("proj_in", "proj_out"):
            found[f"{name}.{part}"] = f"{place}.{part}"
        for block in range(blocks):
            for layer in INSIDE:
                found[f"{name}.transformer_blocks.{block}.{layer}"] = f"{place}.transformer_blocks.{block}.{layer}"

    number = 1  # input block 0 is conv_in
    for level, blocks in enumerate(depth):
        for i in range(res_blocks):
            resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{number}.0")
            if blocks:
                attention(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{number}.1", blocks)
            number += 1
        if level < len(depth) - 1:
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for i, place in enumerate((0, 2)):
        resnet(f"mid_block.resnets.{i}", f"middle_block.{place}")
    attention("mid_block.attentions.0", "middle_block.1", mid)
    number = 0
    for level, blocks in enumerate(reversed(depth)):
        for i in range(res_blocks + 1):
            resnet(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{number}.0")
            if blocks:
                attention(f"up_blocks.{level}.attentions.{i}", f"output_blocks.{number}.1", blocks)
            if i == res_blocks and level < len(depth) - 1:
                found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{2 if blocks else 1}.conv"
            number += 1
    return {"lora_unet_" + name.replace(".", "_"): place for name, place in found.items()}


def _attention(name, place, to_out=True):
    """The picture's and the text's projections of one double block; three of them are parts of one matrix there."""
    return {
        **{f"{name}.attn.to_{k}": f"{place[0]}.qkv[{k}]" for k in "qkv"},
        **{f"{name}.attn.add_{k}_proj": f"{place[1]}.qkv[{k}]" for k in "qkv"},
        f"{name}.attn.to_out.0": f"{place[0]}.proj",
        **({f"{name}.attn.to_add_out": f"{place[1]}.proj"} if to_out else {}),
    }


def sd3_names(depth=24):
    """``transformer.<diffusers name>`` -> weight of the original MM-DiT."""
    found = {
        "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        **{f"time_text_embed.timestep_embedder.linear_{i}": f"t_embedder.mlp.{2 * i - 2}" for i in (1, 2)},
        **{f"time_text_embed.text_embedder.linear_{i}": f"y_embedder.mlp.{2 * i - 2}" for i in (1, 2)},
    }  # fmt: skip
    for i in range(depth):
        name, last = f"transformer_blocks.{i}", i == depth - 1  # the last block's text goes nowhere
        x, context = (f"joint_blocks.{i}.{part}" for part in ("x_block", "context_block"))
        found |= _attention(name, (f"{x}.attn", f"{context}.attn"), to_out=not last)
        found |= {f"{name}.ff.net.0.proj": f"{x}.mlp.fc1", f"{name}.ff.net.2": f"{x}.mlp.fc2"}
        found |= {f"{name}.norm1.linear": f"{x}.adaLN", f"{name}.norm1_context.linear": f"{context}.adaLN"}
        if not last:
            found |= {f"{name}.ff_context.net.0.proj": f"{context}.mlp.fc1",
                      f"{name}.ff_context.net.2": f"{context}.mlp.fc2"}  # fmt: skip
    return {f"transformer.{name}": place for name, place in found.items()}


def chroma_names(double=19, single=38):
    """``transformer.<diffusers name>`` -> weight of the original Chroma: FLUX's, without norms and embeddings of time.

    There are no names for the network of the modulations.
    """
    without = (".norm", "time_text_embed", ".modulation")
    return {name: place for name, place in flux_names(double, single).items() if not any(w in name for w in without)}


def flux2_names(double=5, single=20):
    """``transformer.<diffusers name>`` -> weight of the original FLUX.2, of which klein 4B has so many blocks.

    There are no names for the modulations that all blocks share, nor for the time embedding.
    """
    found = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
             "norm_out.linear": "final_layer.adaLN_modulation.1"}  # fmt: skip
    for i in range(double):
        name, place = f"transformer_blocks.{i}", f"double_blocks.{i}"
        found |= _attention(name, (f"{place}.img_attn", f"{place}.txt_attn"))
        for mine, theirs in {"ff": "img", "ff_context": "txt"}.items():
            found |= {f"{name}.{mine}.linear_in": f"{place}.{theirs}_mlp.0"}
            found |= {f"{name}.{mine}.linear_out": f"{place}.{theirs}_mlp.2"}
    for i in range(single):
        name, place = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        found |= {f"{name}.to_qkv_mlp_proj": f"{place}.linear1", f"{name}.to_out": f"{place}.linear2"}
    return {f"transformer.{name}": place for name, place in found.items()}


def flux_names(double=19, single=38):
    """``transformer.<diffusers name>`` -> weight of the original FLUX."""
    found = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
             "norm_out.linear": "final_layer.adaLN_modulation.1"}  # fmt: skip
    for mine, theirs in {"timestep": "time_in", "guidance": "guidance_in", "text": "vector_in"}.items():
        found |= {f"time_text_embed.{mine}_embedder.linear_{i + 1}": f"{theirs}.{('in', 'out')[i]}" for i in (0, 1)}
    for i in range(double):
        name, place = f"transformer_blocks.{i}", f"double_blocks.{i}"
        found |= _attention(name, (f"{place}.img_attn", f"{place}.txt_attn"))
        for mine, theirs in {"ff": "img", "ff_context": "txt"}.items():
            found |= {f"{name}.{mine}.net.0.proj": f"{place}.{theirs}_mlp.0"}
            found |= {f"{name}.{mine}.net.2": f"{place}.{theirs}_mlp.2"}
        found |= {f"{name}.norm1.linear": f"{place}.img_mod", f"{name}.norm1_context.linear": f"{place}.txt_mod"}
    for i in range(single):
        name, place = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        found |= {f"{name}.attn.to_{k}": f"{place}.linear1[{k}]" for k in "qkv"}
        found |= {f"{name}.proj_mlp": f"{place}.linear1[mlp]", f"{name}.proj_out": f"{place}.linear2"}
        found |= {f"{name}.norm.linear": f"{place}.modulation"}
    return {f"transformer.{name}": place for name, place in found.items()}


_ATTENTION = [f"to_{k}" for k in ("q", "k", "v", "out.0")]
_OUTSIDE = ["img_in", "norm_out.linear", "proj_out",
            *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2))]  # fmt: skip


def qwen_names(depth=60):
    """``transformer.<diffusers name>`` -> weight of Qwen-Image, whose own names ComfyUI keeps."""
    layers = [*_ATTENTION, *(f"add_{k}_proj" for k in "qkv"), "to_add_out"]
    inside = [f"attn.{layer}" for layer in layers]
    inside += [f"{stream}_{part}" for stream in ("img", "txt") for part in ("mod.1", "mlp.net.0.proj", "mlp.net.2")]
    names = [*_OUTSIDE, "txt_in", *(f"transformer_blocks.{i}.{layer}" for i in range(depth) for layer in inside)]
    return {f"transformer.{name}": name for name in names}


def zimage_names(layers=30, refiners=2):
    """``transformer.<diffusers name>`` -> weight of the original Z-Image, whose three projections are one matrix."""
    found = {
        "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        **{name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
    }  # fmt: skip
    stacks = {"layers": layers, "noise_refiner": refiners, "context_refiner": refiners}
    for name in (f"{stack}.{i}" for stack, count in stacks.items() for i in range(count)):
        found |= {f"{name}.attention.to_{k}": f"{name}.attention.qkv[{k}]" for k in "qkv"}
        found |= {f"{name}.attention.to_out.0": f"{name}.attention.out"}
        found |= {f"{name}.feed_forward.w{k}": f"{name}.feed_forward.w{k}" for k in (1, 2, 3)}
        if not name.startswith("context"):  # which no time modulates
            found |= {f"{name}.adaLN_modulation.0": f"{name}.adaLN_modulation.0"}
    return {f"transformer.{name}": place for name, place in found.items()}


def krea2_names(depth=28, fused=2):
    """``transformer.<diffusers name>`` -> weight of the original Krea 2."""
    found = {
        "img_in": "first", "time_mod_proj": "tproj.1", "text_fusion.projector": "txtfusion.projector",
        "final_layer.linear": "last.linear", "time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2",
        "txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3",
    }  # fmt: skip
    stacks = {f"transformer_blocks.{i}": f"blocks.{i}" for i in range(depth)}
    for kind in ("layerwise_blocks", "refiner_blocks"):
        stacks |= {f"text_fusion.{kind}.{i}": f"txtfusion.{kind}.{i}" for i in range(fused)}
    inside = {f"attn.to_{k}": f"attn.w{k}" for k in "qkv"} | {f"ff.{k}": f"mlp.{k}" for k in ("gate", "up", "down")}
    inside |= {"attn.to_gate": "attn.gate", "attn.to_out.0": "attn.wo"}
    for name, place in stacks.items():
        found |= {f"{name}.{mine}": f"{place}.{theirs}" for mine, theirs in inside.items()}
    return {f"transformer.{name}": place for name, place in found.items()}


def qwen21_names(depth=32):
    """``transformer.<diffusers name>`` -> weight of Qwen-Image-2.1, in which one matrix holds gate and projection."""
    names = {name: name for name in [*_OUTSIDE, "modulation.1", "txt_in.in_layer", "txt_in.out_layer"]}
    for block in (f"transformer_blocks.{i}" for i in range(depth)):
        names |= {f"{block}.attn.{layer}": f"{block}.attn.{layer}" for layer in _ATTENTION}
        names |= {f"{block}.img_mlp.{half}": f"{block}.img_mlp.gate_up[{half}]" for half in ("gate_layer", "proj")}
        names[f"{block}.img_mlp.out"] = f"{block}.img_mlp.out"
    return {f"transformer.{name}": place for name, place in names.items()}
