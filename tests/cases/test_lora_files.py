"""LoRA files that people have, through the one reader: the whole change of every weight, or one true sentence."""

from __future__ import annotations

import json
import math
import re
import warnings

import pytest
import torch

from tests.cases.lora_inputs import (
    CONV,
    FLUX_ONE,
    FLUX_Q,
    NORM,
    OUT,
    WORDS,
    K,
    Q,
    cp,
    decomposed,
    drawn,
    effect,
    header,
    kernels,
    kohya,
    kohya_name,
    kron,
    low_rank,
    pair,
    peft,
    refusal,
    split,
    weight,
    weights,
    worst,
    write,
)  # fmt: skip

A, B = pair("sd15", Q)
A2, B2 = pair("sd15", K, 8, seed=5)
AO, BO = pair("sd15", OUT, seed=7)
AC, BC = pair("sd15", CONV, seed=9)
FA, FB = pair("flux", FLUX_Q)
AB = low_rank(A, B)
ROW, BIAS = drawn(32, seed=1, scale=1.0), drawn(32, seed=2, scale=1.0)


def unet(layer, change, kind="weight"):
    return {f"unet.{layer}.{kind}": change}


def transformer(*layers, change):
    return {f"transformer.{name}": rows for name, rows in split(change, *layers).items()}


def both(alpha=None):
    """Two layers of two ranks in kohya's layout; alpha of the first alone."""
    return {**kohya(Q, A, B, alpha), **kohya(K, A2, B2)}


BOTH = {**unet(Q, AB), **unet(K, low_rank(A2, B2))}


def plain():
    """Every spelling of plain LoRA for a UNet."""
    yield "kohya, alpha 2 of rank 4", kohya(Q, A, B, 2), None, unet(Q, AB / 2)
    yield "kohya, no alpha, two ranks", both(), None, BOTH
    yield "kohya, alpha zero", {**kohya(Q, A, B, 0), **kohya(K, A2, B2, 8)}, None, unet(K, low_rank(A2, B2))
    yield "kohya, bf16", {k: t.bfloat16() for k, t in kohya(Q, A, B, 2).items()}, None, unet(
        Q, low_rank(A.bfloat16(), B.bfloat16()) / 2)  # fmt: skip
    for fp8 in (torch.float8_e4m3fn, torch.float8_e5m2):
        yield f"kohya, {fp8}", {k: t.to(fp8) for k, t in kohya(Q, A, B, 2).items()}, None, unet(
            Q, low_rank(A.to(fp8), B.to(fp8)) / 2)  # fmt: skip
    yield "kohya, alpha a whole number in a list", {
        **kohya(Q, A, B), f"{kohya_name(Q)}.alpha": torch.tensor([2])}, None, unet(Q, AB / 2)  # fmt: skip
    yield "kohya, convolution", kohya(CONV, AC, BC, 2), None, unet(CONV, low_rank(AC, BC) / 2)
    yield "kohya, original names", kohya(
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q", A, B, 2), None, unet(Q, AB / 2)  # fmt: skip
    yield "lycoris_", kohya(Q, A, B, 2, "lycoris_"), None, unet(Q, AB / 2)
    yield "peft, two ranks", {**peft(Q, A, B), **peft(K, A2, B2)}, None, BOTH
    yield "peft, an adapter's name", peft(Q, A, B, down="lora_A.default.weight", up="lora_B.default.weight"), None, \
        unet(Q, AB)  # fmt: skip
    for prefix in ("", "unet.", "diffusion_model.", "model.diffusion_model.", "module.", "unet._orig_mod."):
        yield f"peft, prefix '{prefix}'", peft(Q, A, B, prefix), None, unet(Q, AB)
        old = Q.replace("to_q", "processor.to_q")
        yield f"old diffusers, prefix '{prefix}'", peft(
            old, A, B, prefix, "_lora.down.weight"[1:], "lora.up.weight"), None, unet(Q, AB)  # fmt: skip
    yield "processors", {k.replace(".lora.", "_lora."): t for k, t in peft(
        Q.replace("to_q", "processor.to_q"), A, B, "", "lora.down.weight", "lora.up.weight").items()}, None, \
        unet(Q, AB)  # fmt: skip
    yield "processors, to_out", {k.replace(".lora.", "_lora."): t for k, t in peft(
        OUT.replace("to_out.0", "processor.to_out"), AO, BO, "unet.", "lora.down.weight", "lora.up.weight").items()
        }, None, unet(OUT, low_rank(AO, BO))  # fmt: skip
    yield "lora_linear_layer", peft(
        Q, A, B, "unet.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), None, \
        unet(Q, AB)  # fmt: skip
    yield "peft with a tensor of alpha", {**peft(Q, A, B), f"unet.{Q}.alpha": torch.tensor(2.0)}, None, unet(Q, AB / 2)


def of_peft():
    """Settings of peft's in a file's header."""
    tensors = {**peft(Q, A, B), **peft(K, A2, B2)}
    yield "alpha", peft(Q, A, B), header(lora_alpha=1, r=4), unet(Q, AB / 4)
    own = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 4}})}
    yield "a network's own file", {**peft(Q, A, B, ""), **peft(K, A2, B2, "")}, own, {
        **unet(Q, AB * 2), **unet(K, low_rank(A2, B2) / 2)}  # fmt: skip
    yield "alpha none", peft(Q, A, B), header(lora_alpha=None), unet(Q, AB)
    yield "alpha in words", peft(Q, A, B), header(lora_alpha="8", r=4), unet(Q, AB * 2)
    yield "rank of a billion", peft(Q, A, B), header(lora_alpha=8, r=10**9), unet(Q, AB * 2)
    yield "rsLoRA", peft(Q, A, B), header(lora_alpha=8, r=4, use_rslora=True), unet(Q, AB * 8 / math.sqrt(4))
    pattern = header(lora_alpha=8, r=4, alpha_pattern={"attn1.to_q": 2}, rank_pattern={"attn1.to_k": 8})
    yield "alpha by the end of a name", tensors, pattern, {
        **unet(Q, AB / 2), **unet(K, low_rank(A2, B2))}  # fmt: skip
    pattern = header(lora_alpha=8, r=4, alpha_pattern={r".*attn\d\.to_k": 4, "to_z": 1})
    yield "alpha by an expression", tensors, pattern, {**unet(Q, AB * 2), **unet(K, low_rank(A2, B2) / 2)}
    yield "no end of a name", peft(Q, A, B), header(lora_alpha=8, alpha_pattern={"o_q": 1}), unet(Q, AB * 2)
    size = weight("sd15", Q).norm(dim=1) * 1.5
    yield "DoRA", {**peft(Q, A, B), f"unet.{Q}.lora_magnitude_vector": size.float()}, header(
        lora_alpha=8, r=4, use_dora=True), unet(Q, decomposed(weight("sd15", Q), AB * 2, size.float(), 0))  # fmt: skip
    size = weight("sd15", CONV).flatten(1).norm(dim=1) * 1.5
    yield "DoRA of a convolution", {
        **peft(CONV, AC, BC), f"unet.{CONV}.lora_magnitude_vector.weight": size.float().reshape(1, -1, 1, 1)}, None, \
        unet(CONV, decomposed(weight("sd15", CONV), low_rank(AC, BC), size.float(), 0))  # fmt: skip
    yield "a bias", {**peft(OUT, AO, BO), f"unet.{OUT}.lora_B.bias": BIAS}, header(lora_alpha=8, r=4), {
        **unet(OUT, low_rank(AO, BO) * 2), **unet(OUT, BIAS.double() * 2, "bias")}  # fmt: skip


def of_lycoris():
    """Other forms, in kohya's names."""
    q, conv = kohya_name(Q), kohya_name(CONV)
    down, mid, up = drawn(4, 16, 1, 1), drawn(4, 4, 3, 3, scale=0.3), drawn(16, 4, 1, 1)
    yield "CP-LoCon", {
        f"{conv}.lora_down.weight": down, f"{conv}.lora_mid.weight": mid, f"{conv}.lora_up.weight": up,
        f"{conv}.alpha": torch.tensor(2.0)}, None, unet(CONV, cp(down, mid, up) / 2)  # fmt: skip
    one, two, three, four = (drawn(32, 2, seed=i, scale=1.0) for i in range(4))
    hada = {f"{q}.hada_w1_a": one, f"{q}.hada_w1_b": two.T, f"{q}.hada_w2_a": three, f"{q}.hada_w2_b": four.T}
    product = low_rank(two.T, one) * low_rank(four.T, three)
    yield "LoHa", {**hada, f"{q}.alpha": torch.tensor(1.0)}, None, unet(Q, product / 2)
    yield "LoHa beside LoRA", {**hada, **kohya(K, A2, B2, 4)}, None, {
        **unet(Q, product), **unet(K, low_rank(A2, B2) / 2)}  # fmt: skip
    ends = [drawn(2, 16, seed=i, scale=1.0) for i in range(4)]
    cores = [drawn(2, 2, 3, 3, seed=i, scale=1.0) for i in range(2)]
    yield "LoHa with cores", {
        f"{conv}.hada_w1_a": ends[0], f"{conv}.hada_w1_b": ends[1], f"{conv}.hada_t1": cores[0],
        f"{conv}.hada_w2_a": ends[2], f"{conv}.hada_w2_b": ends[3], f"{conv}.hada_t2": cores[1]}, None, unet(
        CONV, cp(ends[1], cores[0], ends[0].T) * cp(ends[3], cores[1], ends[2].T))  # fmt: skip
    w1, w2 = drawn(4, 4), drawn(8, 8)
    yield "LoKr of two full factors, whatever alpha", {
        f"{q}.lokr_w1": w1, f"{q}.lokr_w2": w2, f"{q}.alpha": torch.tensor(3.0)}, None, \
        unet(Q, kron(w1, w2))  # fmt: skip
    a, b = drawn(8, 2, seed=3, scale=1.0), drawn(2, 8, seed=4, scale=1.0)
    yield "LoKr of a product", {
        f"{q}.lokr_w1": w1, f"{q}.lokr_w2_a": a, f"{q}.lokr_w2_b": b, f"{q}.alpha": torch.tensor(3.0)}, None, unet(
        Q, kron(w1, low_rank(b, a)) * 1.5)  # fmt: skip
    c, d = drawn(4, 3, seed=5, scale=1.0), drawn(3, 4, seed=6, scale=1.0)
    yield "LoKr of two products: the rank of the second", {
        f"{q}.lokr_w1_a": c, f"{q}.lokr_w1_b": d, f"{q}.lokr_w2_a": a, f"{q}.lokr_w2_b": b,
        f"{q}.alpha": torch.tensor(3.0)}, None, unet(Q, kron(low_rank(d, c), low_rank(b, a)) * 1.5)  # fmt: skip
    kernel = drawn(4, 4, 3, 3)
    yield (
        "LoKr of a convolution",
        {f"{conv}.lokr_w1": w1, f"{conv}.lokr_w2": kernel},
        None,
        unet(CONV, kernels(lambda i, j: kron(w1, kernel[..., i, j]))),
    )
    flat = drawn(2, 36, seed=8)
    yield "LoKr of a convolution, flat", {
        f"{conv}.lokr_w1": w1, f"{conv}.lokr_w2_a": a[:4], f"{conv}.lokr_w2_b": flat}, None, unet(
        CONV, kernels(lambda i, j: kron(w1, low_rank(flat, a[:4]).reshape(4, 4, 3, 3)[..., i, j])))  # fmt: skip
    left, right, core = (drawn(*s, seed=11, scale=1.0) for s in ((2, 4), (2, 4), (2, 2, 3, 3)))
    yield "LoKr with a core", {
        f"{conv}.lokr_w1": w1, f"{conv}.lokr_w2_a": left, f"{conv}.lokr_w2_b": right, f"{conv}.lokr_t2": core,
        f"{conv}.alpha": torch.tensor(1.0)}, None, unet(
        CONV, kernels(lambda i, j: kron(w1, cp(right, core, left.T)[..., i, j])) / 2)  # fmt: skip
    whole = drawn(32, 32)
    yield "diff", {f"{q}.diff": whole}, None, unet(Q, whole.double())
    yield "diff has no alpha", {f"{q}.diff": whole, f"{q}.alpha": torch.tensor(9.0)}, None, unet(Q, whole.double())
    yield "diff_b", {**kohya(OUT, AO, BO, 2), f"{kohya_name(OUT)}.diff_b": BIAS}, None, {
        **unet(OUT, low_rank(AO, BO) / 2), **unet(OUT, BIAS.double(), "bias")}  # fmt: skip
    yield "diff_b alone", {f"{kohya_name(OUT)}.diff_b": BIAS}, None, unet(OUT, BIAS.double(), "bias")
    norm = kohya_name(NORM)
    yield "norms", {**kohya(Q, A, B, 4), f"{norm}.w_norm": ROW, f"{norm}.b_norm": BIAS}, None, {
        **unet(Q, AB), **unet(NORM, ROW.double()), **unet(NORM, BIAS.double(), "bias")}  # fmt: skip
    yield "diff of a norm", {f"{norm}.diff": ROW, f"{norm}.diff_b": BIAS}, None, {
        **unet(NORM, ROW.double()), **unet(NORM, BIAS.double(), "bias")}  # fmt: skip
    w = weight("sd15", Q)
    columns = (w.norm(dim=0, keepdim=True) * 1.5).float()
    yield "DoRA by columns", {**kohya(Q, A, B, 2), f"{q}.dora_scale": columns}, None, unet(
        Q, decomposed(w, AB / 2, columns, 1))  # fmt: skip
    rows = (w.norm(dim=1, keepdim=True) * 1.5).float()
    yield "DoRA by rows in kohya's names", {**kohya(Q, A, B, 2), f"{q}.dora_scale": rows}, None, unet(
        Q, decomposed(w, AB / 2, rows, 0))  # fmt: skip
    w = weight("sd15", CONV)
    columns = (w.transpose(0, 1).flatten(1).norm(dim=1) * 1.5).float().reshape(1, -1, 1, 1)
    yield "DoRA by columns of a convolution", {**kohya(CONV, AC, BC), f"{conv}.dora_scale": columns}, None, unet(
        CONV, decomposed(w, low_rank(AC, BC), columns, 1))  # fmt: skip
    columns = (weight("sd15", Q).norm(dim=0, keepdim=True) * 0.5).float()
    yield "DoRA of a LoKr", {f"{q}.lokr_w1": w1, f"{q}.lokr_w2": w2, f"{q}.dora_scale": columns}, None, unet(
        Q, decomposed(weight("sd15", Q), kron(w1, w2), columns, 1))  # fmt: skip


UNET = {f"{group.__name__}: {name}": case for group in (plain, of_peft, of_lycoris) for name, *case in group()}


@pytest.mark.parametrize("name", UNET)
def test_the_change_of_a_unet_is_the_formulas(name, tmp_path):
    tensors, metadata, wanted = UNET[name]
    found = effect("sd15", write(tmp_path / "x.safetensors", tensors, metadata))
    assert worst(found, wanted) <= 2e-6


# ---------------------------------------------------------------- transformers, and layers that files hold as one


def halves(change):
    """The two halves of its rows, the second first: shift and scale of a last modulation."""
    return torch.cat(change.chunk(2)[::-1])


def of_flux():
    h, block, one = 16, "transformer_blocks.0", FLUX_ONE
    qkv = [f"{block}.attn.to_{x}" for x in "qkv"]
    a, b = drawn(4, h), drawn(3 * h, 4)
    fused = transformer(*qkv, change=low_rank(a, b))
    half = {name: t / 2 for name, t in fused.items()}
    yield "kohya, fused", kohya("double_blocks.0.img_attn.qkv", a, b, 2), None, half
    yield "ComfyUI's names, fused", peft("double_blocks.0.img_attn.qkv", a, b, "diffusion_model."), None, fused
    yield "original names", peft("double_blocks.0.img_attn.qkv", a, b, ""), None, fused
    yield "fal's trainer", peft("double_blocks.0.img_attn.qkv", a, b, "base_model.model."), None, fused
    yield "XLabs, fused", peft(
        "double_blocks.0.processor.qkv_lora1", a, b, "", "down.weight", "up.weight"), None, fused  # fmt: skip
    yield "XLabs, out of a single block", peft(
        "single_blocks.0.processor.proj_lora", *(one_ := (drawn(4, 80), drawn(16, 4))), "", "down.weight",
        "up.weight"), None, transformer(f"{one}.proj_out", change=low_rank(*one_))  # fmt: skip
    for prefix in ("lora_transformer_", "lycoris_"):
        yield prefix, kohya(FLUX_Q, FA, FB, 2, prefix), None, transformer(FLUX_Q, change=low_rank(FA, FB) / 2)
    yield "diffusers", peft(FLUX_Q, FA, FB, "transformer."), None, transformer(FLUX_Q, change=low_rank(FA, FB))
    yield "diffusers, kohya's endings", {
        k.replace("_", ".", 0).replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t
        for k, t in peft(FLUX_Q, FA, FB, "transformer.").items()}, None, transformer(
        FLUX_Q, change=low_rank(FA, FB))  # fmt: skip
    wide = drawn(3 * h + 4 * h, 4)
    change = low_rank(a, wide)
    parts = {**transformer(*(f"{one}.attn.to_{x}" for x in "qkv"), change=change[: 3 * h]),
             **transformer(f"{one}.proj_mlp", change=change[3 * h :])}  # fmt: skip
    yield "linear1 of a single block", kohya("single_blocks.0.linear1", a, wide, 4), None, parts
    norm = low_rank(a, drawn(2 * h, 4, seed=3))
    yield "the last modulation", kohya("final_layer.adaLN_modulation.1", a, drawn(2 * h, 4, seed=3)), None, transformer(
        "norm_out.linear", change=halves(norm))  # fmt: skip
    bias = drawn(3 * h, seed=4)
    yield "the bias of a fused layer", {
        **kohya("double_blocks.0.img_attn.qkv", a, b, 4), f"{kohya_name('double_blocks.0.img_attn.qkv')}.diff_b": bias
        }, None, {**fused, **{f"transformer.{name}.bias": t.double() for name, t in zip(
            qkv, bias.chunk(3), strict=True)}}  # fmt: skip
    w = torch.cat([weight("flux", name) for name in qkv])
    columns = (w.norm(dim=0, keepdim=True) * 1.5).float()
    yield "DoRA of a fused layer: norms over all of its rows", {
        **kohya("double_blocks.0.img_attn.qkv", a, b, 4), f"{kohya_name('double_blocks.0.img_attn.qkv')}.dora_scale":
        columns}, None, transformer(*qkv, change=decomposed(w, low_rank(a, b), columns, 1))  # fmt: skip
    words = weights("flux")["text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight"]
    t5 = drawn(4, words.shape[1], seed=6), drawn(words.shape[0], 4, seed=7)
    for prefix in ("lora_te2_", "lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_2.", "t5."):
        yield f"T5 as {prefix}", {
            **kohya("double_blocks.0.img_attn.qkv", a, b, 2),
            **kohya("encoder.block.0.layer.0.SelfAttention.q", *t5, 4, prefix=prefix)}, None, {
            **half, "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight": low_rank(*t5)}  # fmt: skip


def of_sd3():
    h, name = 16, "joint_blocks.0.x_block.attn.qkv"
    a, b = drawn(4, h), drawn(3 * h, 4)
    fused = transformer(*(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"), change=low_rank(a, b))
    yield "kohya", kohya(name, a, b, 4), None, fused
    yield "ComfyUI's names", peft(name, a, b, "diffusion_model."), None, fused
    one = pair("sd3", FLUX_Q)
    for prefix in ("lora_transformer_", "lycoris_"):
        yield prefix, kohya(FLUX_Q, *one, 2, prefix), None, transformer(FLUX_Q, change=low_rank(*one) / 2)
    for prefix in ("transformer.", ""):
        yield f"peft, prefix '{prefix}'", peft(FLUX_Q, *one, prefix), None, transformer(FLUX_Q, change=low_rank(*one))
    change = low_rank(a, drawn(2 * h, 4, seed=3))
    yield "the text's last modulation", kohya(
        "joint_blocks.3.context_block.adaLN_modulation.1", a, drawn(2 * h, 4, seed=3)), None, transformer(
        "transformer_blocks.3.norm1_context.linear", change=halves(change))  # fmt: skip
    change = low_rank(a, drawn(6 * h, 4, seed=3))
    yield "the text's other modulations", kohya(
        "joint_blocks.0.context_block.adaLN_modulation.1", a, drawn(6 * h, 4, seed=3)), None, transformer(
        "transformer_blocks.0.norm1_context.linear", change=change)  # fmt: skip


def of_sdxl():
    a, b = pair("sdxl", Q)
    change = unet(Q, low_rank(a, b))
    first, second = (weights("sdxl")[f"{part}.{name}.weight"] for part, name in (
        ("text_encoder", WORDS), ("text_encoder_2", f"text_model.{WORDS}")))  # fmt: skip
    one, two = ((drawn(4, w.shape[1], seed=8), drawn(w.shape[0], 4, seed=9)) for w in (first, second))
    encoders = {f"text_encoder.{WORDS}.weight": low_rank(*one),
                f"text_encoder_2.text_model.{WORDS}.weight": low_rank(*two)}  # fmt: skip
    yield "kohya, both text encoders", {
        **kohya(Q, a, b, 4), **kohya(f"text_model.{WORDS}", *one, 4, "lora_te1_"),
        **kohya(f"text_model.{WORDS}", *two, 4, "lora_te2_")}, None, {**change, **encoders}  # fmt: skip
    yield "text encoders alone, as diffusers has them", {
        **peft(f"text_model.{WORDS}", *one, "text_encoder.", "lora_linear_layer.down.weight",
               "lora_linear_layer.up.weight"),
        **peft(f"text_model.{WORDS}", *two, "text_encoder_2.")}, None, encoders  # fmt: skip
    yield "text encoders as ComfyUI has them", {
        **kohya(f"text_model.{WORDS}", *one, 4, "text_encoders.clip_l.transformer."),
        **kohya(f"text_model.{WORDS}", *two, 4, "text_encoders.clip_g.transformer.")}, None, encoders  # fmt: skip
    add = pair("sdxl", "add_embedding.linear_1")
    for name in ("add_embedding.linear_1", "label_emb.0.0"):
        yield name, kohya(name, *add, 4), None, unet("add_embedding.linear_1", low_rank(*add))
    conv = pair("sdxl", "conv_in")
    yield "the first convolution", kohya("input_blocks.0.0", *conv), None, unet("conv_in", low_rank(*conv))


def of_pixart():
    a, b = drawn(4, 24), drawn(48, 4)
    yield "keys and values as one", peft("blocks.1.cross_attn.kv_linear", a, b, "diffusion_model."), None, transformer(
        "transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_v", change=low_rank(a, b))  # fmt: skip


OTHERS = {f"{group.__name__[3:]}: {name}": (group.__name__[3:], *case)
          for group in (of_flux, of_sd3, of_sdxl, of_pixart) for name, *case in group()}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_change_of_other_networks_is_the_formulas(name, tmp_path):
    pipeline, tensors, metadata, wanted = OTHERS[name]
    assert worst(effect(pipeline, write(tmp_path / "x.safetensors", tensors, metadata)), wanted) <= 2e-6


# ---------------------------------------------------------------- what is refused, before anything is changed


def of_another_model():
    elsewhere = Q.replace("blocks.1", "blocks.3")
    yield (
        "half of it",
        "sd15",
        {**kohya(Q, A, B), **kohya(elsewhere, A, B)},
        None,
        r"is of another model \(a UNet of Stable Diffusion\): only 1 of its 2 layers are in this UNet2D.*blocks_3",
    )
    yield (
        "FLUX on a UNet",
        "sd15",
        kohya("double_blocks.0.img_attn.qkv", A, B),
        None,
        r"another model \(FLUX.1\): only 0",
    )
    yield "SD3 on FLUX", "flux", kohya("joint_blocks.0.x_block.attn.qkv", A, B), None, r"model \(Stable Diffusion 3\)"
    yield "FLUX on SD3", "sd3", peft(f"{FLUX_ONE}.attn.to_q", A, B, "transformer."), None, r"another model \(FLUX.1\)"
    yield "a UNet's on FLUX", "flux", peft(Q, A, B), None, r"another model \(a UNet of Stable Diffusion\)"
    wide = {**kohya(Q.replace("attn1.to_q", "attn2.to_k"), drawn(4, 2048), B)}
    yield "SDXL on SD 1.5, by its width", "sd15", wide, None, r"does not fit UNet2D.*it is for Stable Diffusion XL"
    yield (
        "other shapes",
        "sd15",
        kohya(Q, A[:, :16], B),
        None,
        r"does not fit UNet2D.*lora_down.* another shape \(4 x 16\)",
    )
    yield (
        "rows and columns exchanged",
        "flux",
        peft(f"{FLUX_ONE}.proj_mlp", drawn(4, 64), drawn(16, 4), ""),
        None,
        "another shape",
    )
    longer = kohya("text_model.encoder.layers.30.mlp.fc1", A, B, prefix="lora_te_")
    alone = peft("text_model.encoder.layers.0.self_attn.q_proj", A, B, "")
    yield (
        "a text encoder's, of none by name",
        "sd15",
        alone,
        None,
        r"another model \(a text encoder by itself\): only 0",
    )
    match = r"another model \(one with another text encoder\): only 0 of its 1 layers are in this model"
    yield "a longer text encoder's", "sd15", longer, None, match
    yield (
        "a text encoder that is not here",
        "sd15",
        kohya(f"text_model.{WORDS}", A, B, prefix="lora_te2_"),
        None,
        "adapts the text_encoder_2, which this model lacks: lora_te2_",
    )


def of_unknown_layout():
    yield (
        "no known layer",
        "sd15",
        peft("foo.bar", A, B),
        None,
        "layout that is not known here.*like unet.foo.bar.lora_",
    )
    yield (
        "an unknown ending",
        "sd15",
        {**kohya(Q, A, B), f"{kohya_name(Q)}.lora_extra": A},
        None,
        "has a layout that is not known here: it holds .*lora_extra",
    )
    yield "no LoRA", "sd15", {"nothing": A}, None, "holds no LoRA: none of its tensors is one's, such as nothing"
    yield "no tensors", "sd15", {}, None, "holds no LoRA"
    mixed = {**peft(Q, A, B), **peft(K, A2, B2, "unet.", "lora.down.weight", "lora.up.weight")}
    yield (
        "mixed layouts",
        "sd15",
        mixed,
        None,
        "mixes (?=.*peft's lora_A)(?=.*diffusers' lora.down).* convert it to one layout",
    )
    yield "mixed layouts, kohya first", "sd15", {**kohya(Q, A, B), **peft(K, A2, B2)}, None, "mixes "
    yield "one layer twice", "sd15", {**kohya(Q, A, B), **kohya(Q, A, B, prefix="lycoris_")}, None, "one layer twice"
    yield "two adapters", "sd15", {
        **peft(Q, A, B, down="lora_A.one.weight", up="lora_B.one.weight"),
        **peft(Q, A, B, down="lora_A.two.weight", up="lora_B.two.weight")}, None, "one layer twice"  # fmt: skip


def of_other_kinds():
    block = "transformer_blocks.0.attn"
    yield "a norm's weights", "flux", {
        **peft(FLUX_Q, FA, FB, "transformer."), f"transformer.{block}.norm_q.weight": torch.ones(8)}, None, \
        rf"new weights of a norm, transformer.{block}.norm_q.weight, beside its LoRA"  # fmt: skip
    yield (
        "a wider input",
        "flux",
        peft("x_embedder", drawn(4, 32), drawn(16, 4), "transformer."),
        None,
        r"widens x_embedder from 16 to 32 inputs, as Control LoRAs do \(transformer.x_embedder.lora_A.weight\)",
    )
    yield (
        "a wider first convolution",
        "sd15",
        kohya("conv_in", drawn(4, 8, 3, 3), drawn(16, 4, 1, 1)),
        None,
        "widens conv_in from 4 to 8 inputs",
    )
    yield (
        "Stability's Control LoRA",
        "sd15",
        {"lora_controlnet": torch.zeros(1), f"{Q}.down": A},
        None,
        "a Control LoRA",
    )
    yield "OFT", "sd15", {f"{kohya_name(Q)}.oft_blocks": drawn(2, 8, 8)}, None, "holds OFT or BOFT .*not supported"
    yield "GLoRA", "sd15", {f"{kohya_name(Q)}.{x}.weight": A for x in ("a1", "a2", "b1", "b2")}, None, "holds GLoRA"
    yield "an embedding", "sd15", {"emb_params": drawn(4, 16)}, None, "holds a textual inversion"
    yield (
        "a bias of what has none",
        "sd15",
        {**peft(Q, A, B), f"unet.{Q}.lora_B.bias": BIAS},
        None,
        "changes the bias of .*to_q, which has none",
    )
    yield (
        "PiSSA",
        "sd15",
        peft(Q, A, B),
        header(lora_alpha=8, init_lora_weights="pissa_niter_4"),
        "initialised by pissa",
    )
    yield "another kind of peft's", "sd15", peft(Q, A, B), header(peft_type="OFT"), "of peft's kind OFT"


def of_damage():
    yield "up alone", "sd15", {**kohya(Q, A, B), f"{kohya_name(K)}.lora_up.weight": B}, None, "lacks its down"
    yield "up alone in the last layer", "sd15", {**kohya(K, A2, B2), f"{kohya_name(Q)}.lora_up.weight": B}, None, "to_q"
    yield "down alone", "sd15", {**kohya(Q, A, B), f"{kohya_name(K)}.lora_down.weight": A}, None, "lacks its up"
    yield "alpha alone", "sd15", {**kohya(Q, A, B), f"{kohya_name(K)}.alpha": torch.ones(())}, None, "has no weights"
    yield "half a LoHa", "sd15", {f"{kohya_name(Q)}.hada_w1_a": A}, None, "lacks its hada_w1_b"
    yield "half a LoKr", "sd15", {f"{kohya_name(Q)}.lokr_w1": A}, None, "lacks its lokr_w2_a"
    yield "a factor twice", "sd15", {
        f"{kohya_name(Q)}.{name}": drawn(*shape)
        for name, shape in {"lokr_w1": (4, 4), "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2": (8, 8)}.items()
    }, None, "holds lokr_w1 twice"  # fmt: skip
    yield "two forms", "sd15", {**kohya(Q, A, B), f"{kohya_name(Q)}.diff": drawn(32, 32)}, None, "LoRA and diff at once"
    number = torch.tensor(1.0)
    for name, tensors in {
        "diff": {f"{kohya_name(Q)}.diff": number},
        "a magnitude": {**kohya(Q, A, B), f"{kohya_name(Q)}.dora_scale": number},
        "a factor": {f"{kohya_name(Q)}.lokr_w1": number, f"{kohya_name(Q)}.lokr_w2": number},
    }.items():  # fmt: skip
        yield f"a single number for {name}", "sd15", tensors, None, "is a single number, where a matrix should be"
    settings = header(lora_alpha=8, use_dora=True)
    yield "a DoRA without magnitudes", "sd15", peft(Q, A, B), settings, "is a DoRA, but a layer has no lora_magnitude"
    yield "not a number", "sd15", kohya(Q, A * float("nan"), B), None, "lora_down.weight is not finite"
    yield "rank zero", "sd15", kohya(Q, A[:0], B[:, :0]), None, "holds nothing, where real"
    yield "whole numbers", "sd15", kohya(Q, A.to(torch.int8), B), None, "holds int8, where real numbers"
    for name, alpha in (("not a number", float("nan")), ("absurd", 1e30)):
        yield f"alpha {name}", "sd15", kohya(Q, A, B, alpha), None, "its alpha is absurd"
    yield "two alphas", "sd15", {**kohya(Q, A, B), f"{kohya_name(Q)}.alpha": torch.ones(2)}, None, "no single number"
    yield "broken settings", "sd15", peft(Q, A, B), {"lora_adapter_metadata": "{oops"}, "metadata is damaged"
    yield "settings a list", "sd15", peft(Q, A, B), {"lora_adapter_metadata": "[]"}, "metadata is damaged"
    yield "alpha a word", "sd15", peft(Q, A, B), header(lora_alpha="many"), "metadata is damaged"
    yield "an alpha beyond measure", "sd15", peft(Q, A, B), header(lora_alpha=10**18), "its alpha is absurd"
    yield "a pattern that never ends", "sd15", peft(Q, A, B), header(
        lora_alpha=8, alpha_pattern={"(a+)+$": 1}), "is no layer's name"  # fmt: skip
    for name, pattern in {
        "of much that may be absent": ".?" * 60 + "Z",
        "of choices": "(.|..)" * 30 + "Z",
        "short": "a?b?c?d?e?",
    }.items():
        yield f"a pattern {name}", "sd15", peft(Q, A, B), header(
            lora_alpha=8, alpha_pattern={pattern: 1}), "is no layer's name"  # fmt: skip
    yield "ranks that differ", "sd15", kohya(Q, A, B[:, :2]), None, "another shape"


REFUSED = {f"{group.__name__[3:]}: {name}": case for group in (
    of_another_model, of_unknown_layout, of_other_kinds, of_damage) for name, *case in group()}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_whole_in_one_sentence(name, tmp_path):
    """No parameter of any part has changed, whatever else of the file would have fitted."""
    pipeline, tensors, metadata, match = REFUSED[name]
    path = write(tmp_path / "x.safetensors", tensors, metadata)
    said = refusal(pipeline, path)
    assert re.search(match, said) and str(path) in said and "\n" not in said and len(said) < 400, said


def test_tensors_of_4_bits_are_refused(tmp_path):
    """Which torch holds, but does not compute with."""
    shapes = {f"{kohya_name(Q)}.lora_down.weight": [4, 32], f"{kohya_name(Q)}.lora_up.weight": [32, 4]}
    entries = {
        name: {"dtype": "F4", "shape": shape, "data_offsets": [64 * i, 64 * (i + 1)]}
        for i, (name, shape) in enumerate(shapes.items())
    }
    head = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"\x38" * 128)
    assert re.search(
        "lora_down.weight holds float4.*, which is not supported", refusal("sd15", tmp_path / "x.safetensors")
    )


def test_original_names_by_peft_have_the_scale_of_its_config(tmp_path):
    """fal's trainer writes such names without a config; then the scale is 1."""
    a, b = drawn(4, 16), drawn(48, 4)
    layers = [f"transformer.transformer_blocks.0.attn.to_{one}" for one in "qkv"]
    tensors = peft("double_blocks.0.img_attn.qkv", a, b, "base_model.model.")
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    assert worst(effect("flux", path), split(low_rank(a, b), *layers)) <= 2e-6
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    assert worst(effect("flux", path), split(2 * low_rank(a, b), *layers)) <= 2e-6


# ---------------------------------------------------------------- what has no effect is said, and nothing else


BUNDLE = {"bundle_emb.mytoken.clip_l": drawn(2, 16), "bundle_emb.mytoken.clip_g": drawn(2, 24)}
SAID = {
    "an alpha that one layer lacks": (both(2), "1 of 2 layers of .* have no alpha, such as .*to_k.*: their scale is 1",
                                      {**unet(Q, AB / 2), **unet(K, low_rank(A2, B2))}),
    "embeddings": ({**kohya(Q, A, B, 4), **BUNDLE}, r"The embeddings in .* \(mytoken\) are left out", unet(Q, AB)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_has_no_effect_is_said(name, tmp_path):
    tensors, match, wanted = SAID[name]
    with pytest.warns(UserWarning, match=match):
        found = effect("sd15", write(tmp_path / "x.safetensors", tensors))
    assert worst(found, wanted) <= 2e-6


def test_a_whole_file_has_nothing_to_say(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        effect("sd15", write(tmp_path / "x.safetensors", both()))


@pytest.mark.parametrize("scale", [0.5, -1.0, 0.0])
def test_a_scale_is_that_of_the_whole_change(scale, tmp_path):
    """Of a DoRA too: half of its change, not the change of half its product, which at 0 would not be none."""
    size = (weight("sd15", Q).norm(dim=1) * 1.5).float()
    tensors = {**peft(Q, A, B), f"unet.{Q}.lora_magnitude_vector": size, **kohya(K, A2, B2)}
    tensors = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t for k, t in tensors.items()}
    wanted = {**unet(Q, decomposed(weight("sd15", Q), AB, size, 0)), **unet(K, low_rank(A2, B2))}
    found = effect("sd15", write(tmp_path / "x.safetensors", tensors), scale)
    assert worst(found, {k: scale * t for k, t in wanted.items()}) <= 2e-6 if scale else not found
