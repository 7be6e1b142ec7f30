"""Tiny autoencoders that are not Stable Diffusion's: of squares, of frames, with alpha, without a posterior."""

from __future__ import annotations

import torch


def squares(channels=4):
    """FLUX.2's: four times down, then squares of 2 x 2 whose channels the statistics of a batch norm whiten."""
    from diffusers import AutoencoderKLFlux2

    made = AutoencoderKLFlux2(
        latent_channels=channels, block_out_channels=(8, 8, 16), norm_num_groups=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    made.bn.running_mean = torch.linspace(-0.4, 0.6, 4 * channels)
    made.bn.running_var = torch.linspace(0.5, 1.9, 4 * channels)
    return made


def _statistics(channels):
    return {
        "z_dim": channels, "latents_mean": [0.15 * i - 0.2 for i in range(channels)],
        "latents_std": [0.8 + 0.2 * i for i in range(channels)], "base_dim": 8, "num_res_blocks": 1,
    }  # fmt: skip


def frames(channels=4):
    """Qwen-Image's: of video, four times down in space."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(dim_mult=[1, 2, 2], temperal_downsample=[False, True], **_statistics(channels))


def with_alpha(channels=4):
    """Qwen-Image-2.1's: RGBA, sixteen times down, which its pipeline takes for granted."""
    from diffusers import AutoencoderKLQwenImage21

    return AutoencoderKLQwenImage21(
        decoder_base_dim=8, dim_mult=[1] * 5, temperal_downsample=[False, True, True, True], **_statistics(channels)
    )


def video(channels=4):
    """Wan's: eight times down in space, four times in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(dim_mult=[1] * 4, temperal_downsample=[False, True, True], **_statistics(channels))


def deterministic(channels=4):
    """Sana's: eight times down, no posterior."""
    from diffusers import AutoencoderDC

    blocks, ones = ("ResBlock",) * 3 + ("EfficientViTBlock",), (1,) * 4
    return AutoencoderDC(
        latent_channels=channels, attention_head_dim=2, scaling_factor=0.41407, encoder_block_types=blocks,
        decoder_block_types=blocks, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=ones, decoder_layers_per_block=ones, encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)), downsample_block_type="Conv", upsample_block_type="interpolate",
    )  # fmt: skip
