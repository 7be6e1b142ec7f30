"""Tiny random pipelines of every family, built from configs: nothing is downloaded."""

from __future__ import annotations

import functools

import torch

WORDS = ("a", "red", "blue", "circle", "square", "on", "grass")
PROMPTS = ["a red circle", "a blue square on grass"]


def clip(width, layers=3, projection=None):
    """A CLIP text encoder with its tokenizer; with ``projection``, one that pools too."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from fewstep.scenes64.architecture import build_tokenizer

    tokenizer = build_tokenizer(WORDS)
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), tokenizer


def t5(width):
    """A T5 encoder with its tokenizer, a unigram model of a few words and letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def vae(channels, scale=0.5, shift=None):
    """Four times down; with a shift as SD3's and FLUX's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=channels, scaling_factor=scale,
        shift_factor=shift, sample_size=64,
    )  # fmt: skip


def sd_scheduler(**more):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing", **more,
    )  # fmt: skip


def unet(width, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=width, attention_head_dim=4, **more,
    )  # fmt: skip


def sd15(scheduler=None):
    from diffusers import StableDiffusionPipeline

    encoder, tokenizer = clip(16)
    return StableDiffusionPipeline(
        vae=vae(4), unet=unet(16), text_encoder=encoder, tokenizer=tokenizer, scheduler=scheduler or sd_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sd2v():
    return sd15(sd_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))


def sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    (first, tokenizer), (second, tokenizer_2) = clip(16, projection=None), clip(24, projection=20)
    network = unet(
        40, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20, use_linear_projection=True,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        vae=vae(4), unet=network, text_encoder=first, text_encoder_2=second, tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    (first, tokenizer), (second, tokenizer_2) = clip(8, projection=8), clip(12, projection=12)
    third, tokenizer_3 = t5(32)
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=20, pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae(8, shift=0.1), text_encoder=first, tokenizer=tokenizer, text_encoder_2=second,
        tokenizer_2=tokenizer_2, text_encoder_3=third, tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(guidance_embeds=True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    (first, tokenizer), (second, tokenizer_2) = clip(16), t5(24)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(
        transformer=transformer, vae=vae(4, shift=0.1), text_encoder=first, tokenizer=tokenizer, text_encoder_2=second,
        tokenizer_2=tokenizer_2, scheduler=scheduler,
    )  # fmt: skip


def pixart(told_size=True):
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    encoder, tokenizer = t5(24)
    transformer = PixArtTransformer2DModel(
        sample_size=128 if told_size else 16, in_channels=4, out_channels=8, num_layers=4, attention_head_dim=8,
        num_attention_heads=3, cross_attention_dim=24, caption_channels=24,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return PixArtAlphaPipeline(
        transformer=transformer, vae=vae(4), text_encoder=encoder, tokenizer=tokenizer, scheduler=scheduler
    )


BUILD = {"sd15": sd15, "sd2v": sd2v, "sdxl": sdxl, "sd3": sd3, "flux": flux, "pixart": pixart}
SIZE = 64
"""Side of the pictures that all of them make here."""


@functools.cache
def build(name):
    """The pipeline of that name, every weight awake (parts of some start at zero); nobody may change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = _builder(name)()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
                for parameter in part.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
    if hasattr(pipeline, "set_progress_bar_config"):  # a modular pipeline has none
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _builder(name):
    if name in BUILD:
        return BUILD[name]
    from tests.models import pipelines_flow

    return pipelines_flow.BUILD[name]
