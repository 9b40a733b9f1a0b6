"""An AutoencoderDC of diffusers with random weights, small enough for tests."""

from pathlib import Path

import torch


def save_small_dc(path: Path, levels: int) -> Path:
    """It downsamples by 2^(levels - 1): residual blocks outside, attention over two scales in the last level."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    of_level = {
        "block_out_channels": (8,) + (16,) * (levels - 1),
        "layers_per_block": (1,) * levels,
        "block_types": ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",),
        "qkv_multiscales": ((),) * (levels - 1) + ((5,),),
    }
    both = {f"{side}_{name}": values for side in ("encoder", "decoder") for name, values in of_level.items()}
    AutoencoderDC(**both, latent_channels=8, attention_head_dim=8, scaling_factor=0.41).save_pretrained(path)
    return path
