"""Tiny random pipelines of the flow models of 2024 to 2026, by name; `tests.models.pipelines.build` makes them."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

from tests.models import pipelines_texts as texts
from tests.models import pipelines_vaes as vaes

TURBO21 = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568)
"""The levels of Qwen-Image-2.1-Turbo, which its pipeline takes whatever number of steps it is given."""
_STRETCHED = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "shift_terminal": 0.02, "time_shift_type": "exponential",
}  # fmt: skip
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def euler(**more):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def kl(channels=4):
    from tests.models.pipelines import vae

    return vae(channels, shift=0.1)


def z_image(shift=6.0):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    encoder, reader = texts.qwen3(16, 4)
    network = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=4, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 8, 8], axes_lens=[256, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=network, vae=kl(), text_encoder=encoder, tokenizer=reader, scheduler=euler(shift=shift)
    )


def _flux2_network(embeds_guidance):
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=embeds_guidance, **_HEADS,
    )  # fmt: skip


def klein(is_distilled=False):
    from diffusers import Flux2KleinPipeline

    encoder, reader = texts.qwen3(8, 28, writes=True)
    return Flux2KleinPipeline(
        transformer=_flux2_network(False), vae=vaes.squares(), text_encoder=encoder, tokenizer=reader,
        scheduler=euler(use_dynamic_shifting=True), is_distilled=is_distilled,
    )  # fmt: skip


def flux2_dev():
    from diffusers import Flux2Pipeline

    encoder, reader = texts.mistral3(8, 31)
    return Flux2Pipeline(
        transformer=_flux2_network(True), vae=vaes.squares(), text_encoder=encoder, tokenizer=reader,
        scheduler=euler(use_dynamic_shifting=True),
    )  # fmt: skip


def qwen_image():
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    encoder, reader = texts.qwen_vl(16, 2, 2.5)
    network = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=4, joint_attention_dim=16, axes_dims_rope=(4, 6, 6), **_HEADS
    )
    return QwenImagePipeline(
        transformer=network, vae=vaes.frames(), text_encoder=encoder, tokenizer=reader, scheduler=euler(**_STRETCHED)
    )


def qwen_image21(sample_sigmas=None):
    from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel

    encoder, reader = texts.qwen_vl(16, 3, 3)
    network = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, context_in_dim=16, axes_dims_rope=(4, 6, 6), **_HEADS
    )
    return QwenImage21Pipeline(
        transformer=network, vae=vaes.with_alpha(), text_encoder=encoder, processor=texts.text_processor()(reader),
        scheduler=euler(**({} if sample_sigmas else _STRETCHED)), sample_sigmas=sample_sigmas,
    )  # fmt: skip


def krea2(is_distilled=False):
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    encoder, reader = texts.qwen_vl(16, 4, 3, writes=False)
    network = Krea2Transformer2DModel(
        in_channels=16, num_layers=4, num_key_value_heads=1, intermediate_size=64, axes_dims_rope=(4, 6, 6),
        text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, **_HEADS,
    )  # fmt: skip
    scheduler = euler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
    )
    return Krea2Pipeline(
        transformer=network, vae=vaes.frames(), text_encoder=encoder, tokenizer=reader, scheduler=scheduler,
        text_encoder_select_layers=(1, 2, 3), is_distilled=is_distilled,
    )  # fmt: skip


def _sana_network(**more):
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=4, num_attention_heads=4, attention_head_dim=8, caption_channels=16,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, sample_size=8, **more,
    )  # fmt: skip


def sana():
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    encoder, reader = texts.gemma2(16)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return SanaPipeline(
        transformer=_sana_network(), vae=vaes.deterministic(), text_encoder=encoder, tokenizer=reader,
        scheduler=scheduler,
    )  # fmt: skip


def sana_sprint():
    from diffusers import SanaSprintPipeline, SCMScheduler

    encoder, reader = texts.gemma2(16)
    return SanaSprintPipeline(
        transformer=_sana_network(guidance_embeds=True, qk_norm="rms_norm_across_heads"), vae=vaes.deterministic(),
        text_encoder=encoder, tokenizer=reader, scheduler=SCMScheduler(sigma_data=0.5),
    )  # fmt: skip


def chroma():
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    encoder, reader = texts.t5(24)
    network = ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=64, approximator_hidden_dim=32, approximator_layers=1, **_HEADS,
    )  # fmt: skip
    return ChromaPipeline(
        transformer=network, vae=kl(), text_encoder=encoder, tokenizer=reader,
        scheduler=euler(use_dynamic_shifting=True),
    )  # fmt: skip


def anima():
    """A modular pipeline, to which its parts are given; `stand_in_for_torchvision` first."""
    from diffusers import AnimaAutoBlocks, AnimaTextConditioner, ClassifierFreeGuidance, CosmosTransformer3DModel

    stand_in_for_torchvision()
    (encoder, reader), (_, second) = texts.qwen3(16, 2), texts.t5(16)
    network = CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=4, text_embed_dim=16, adaln_lora_dim=8, max_size=(4, 32, 32),
        rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None, **_HEADS,
    )  # fmt: skip
    conditioner = AnimaTextConditioner(
        source_dim=16, target_dim=16, model_dim=16, num_layers=1, num_attention_heads=2,
        target_vocab_size=len(second), min_sequence_length=64,
    )  # fmt: skip
    made = AnimaAutoBlocks().init_pipeline()
    made.update_components(
        transformer=network, vae=vaes.frames(), text_encoder=encoder, tokenizer=reader, t5_tokenizer=second,
        text_conditioner=conditioner, scheduler=euler(shift=3.0), guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip
    return made


def stand_in_for_torchvision():
    """Cosmos' forward resizes a mask by torchvision: where that is not installed, by PyTorch's own function."""
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        functions = SimpleNamespace(resize=lambda x, size, interpolation: torch.nn.functional.interpolate(x, size))
        modes = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=functions, InterpolationMode=modes)


def wan():
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    encoder, reader = texts.t5(16, multilingual=True)
    network = WanTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=2, text_dim=16,
        freq_dim=32, ffn_dim=32, rope_max_seq_len=64,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        transformer=network, vae=vaes.video(), text_encoder=encoder, tokenizer=reader, scheduler=scheduler
    )


TEACHERS = ("sana", "qwen_image", "z_image", "klein_base", "flux2_dev", "krea2", "chroma", "qwen_image21")
"""Those that are taught from under every method of `tests.runs.test_distill_families` and `benchmarks.matrix`."""

BUILD = {
    "sana": sana, "sana_sprint": sana_sprint, "z_image": z_image, "z_image_turbo": functools.partial(z_image, 3.0),
    "klein_base": klein, "klein": functools.partial(klein, True), "flux2_dev": flux2_dev, "qwen_image": qwen_image,
    "qwen_image21": qwen_image21, "qwen_image21_turbo": functools.partial(qwen_image21, list(TURBO21)),
    "krea2": krea2, "krea2_turbo": functools.partial(krea2, True), "chroma": chroma, "anima": anima, "wan": wan,
}  # fmt: skip
