"""A pipeline as a single file, in the names that Stable Diffusion's own code gave its layers."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file


def save_single_file(pipeline, path):
    """SD 1.x or SDXL, of any size."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in unet_names(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in vae_names(pipeline.vae).items()}
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= clip_names(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip_names(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= clip_names(pipeline.text_encoder, "cond_stage_model.transformer.")
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)


def renamed(name, pairs):
    for old, new in pairs:
        name = re.sub(old, new, name)
    return name


RESNET = [
    (r"\.norm1\.", ".in_layers.0."), (r"\.conv1\.", ".in_layers.2."), (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."), (r"\.conv2\.", ".out_layers.3."), (r"\.conv_shortcut\.", ".skip_connection."),
]  # fmt: skip
ENDS = [
    (r"^conv_in\.", "input_blocks.0.0."), (r"^conv_norm_out\.", "out.0."), (r"^conv_out\.", "out.2."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."), (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."), (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."), (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
]  # fmt: skip


def unet_names(unet):
    layers, attends = unet.config.layers_per_block, ["CrossAttn" in kind for kind in unet.config.up_block_types]

    def place(name):
        found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        if not found:
            return name
        way, block, kind, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if way == "down":
            first = 1 + block * (layers + 1)
            if kind == "downsamplers":
                return f"input_blocks.{first + layers}.0.{rest.replace('conv.', 'op.')}"
            return f"input_blocks.{first + number}.{int(kind == 'attentions')}.{rest}"
        first = block * (layers + 1)
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{1 + attends[block]}.{rest}"
        return f"output_blocks.{first + number}.{int(kind == 'attentions')}.{rest}"

    made = {}
    for name, t in unet.state_dict().items():
        inner = RESNET if ".resnets." in name else []
        made[renamed(place(renamed(name, inner)), ENDS)] = t
    return made


def vae_names(vae):
    last = len(vae.config.block_out_channels) - 1
    pairs = [
        (r"\.conv_norm_out\.", ".norm_out."), (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."), (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."), (r"\.group_norm\.", ".norm."), (r"\.to_q\.", ".q."),
        (r"\.to_k\.", ".k."), (r"\.to_v\.", ".v."), (r"\.to_out\.0\.", ".proj_out."),
    ]  # fmt: skip

    def turned(name):
        found = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.(.*)", name)
        if not found:
            return name
        inner = f"block.{found[3]}" if found[3] is not None else "upsample"
        return f"decoder.up.{last - int(found[1])}.{inner}.{found[4]}"

    made = {}
    for name, t in vae.state_dict().items():
        attends = ".attentions." in name and t.ndim == 2  # they were convolutions of one pixel
        made[renamed(turned(name), pairs)] = t[:, :, None, None] if attends else t
    return made


def clip_names(encoder, prefix):
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}


def open_clip_names(encoder, prefix):
    state = {name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()}
    made = {
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": state.pop("text_projection.weight").T,
    }
    pairs = [
        (r"encoder\.layers\.", "transformer.resblocks."), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
        (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.out_proj", "attn.out_proj"),
    ]  # fmt: skip
    for name in list(state):
        if "q_proj" in name:
            three = [state.pop(name.replace("q_proj", other)) for other in ("q_proj", "k_proj", "v_proj")]
            layer, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name).groups()
            made[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(three)
    made |= {renamed(name, pairs): t for name, t in state.items()}
    return {prefix + name: t for name, t in made.items()}
