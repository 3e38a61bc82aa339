"""A tiny Stable Diffusion: a UNet of diffusers, a text encoder of transformers, and a pipeline folder of both."""

import json
from pathlib import Path

import torch
from torch import nn


def unet(seed: int = 0) -> nn.Module:
    """A UNet with cross-attention, 1×1 and 3×3 convolutions."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def text_encoder(seed: int = 1) -> nn.Module:
    """CLIP's text model with two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def save_pipeline(folder: Path, **models: nn.Module) -> Path:
    """The folder of a diffusers pipeline with these models."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder
