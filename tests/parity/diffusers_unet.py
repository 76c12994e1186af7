"""diffusers' UNet of the same blocks as ours, and its weights under our names."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dd_core.nets.unet import UNetSpec

RENAMED = (
    (r"^conv_in\.", "stem."),
    (r"^time_embedding\.linear_1\.", "hearing.level_in."),
    (r"^time_embedding\.linear_2\.", "hearing.level_out."),
    (r"^conv_norm_out\.", "norm."),
    (r"^conv_out\.", "out."),
    (r"^mid_block\.resnets\.0\.", "middle.residual."),
    (r"^mid_block\.resnets\.1\.", "middle_out."),
    (r"^mid_block\.attentions\.0\.", "middle.attention."),
    (r"^(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.\2.blocks.\3.residual."),
    (r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r"\1.\2.blocks.\3.attention."),
    (r"^down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.shrink."),
    (r"^up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.grow."),
    (r"\.norm1\.", ".norm_in."),
    (r"\.conv1\.", ".conv_in."),
    (r"\.time_emb_proj\.", ".level."),
    (r"\.norm2\.", ".norm_out."),
    (r"\.conv2\.", ".conv_out."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_out\.0\.", ".out."),
)
"""Their names as patterns, ours; every one that fits is applied, from the top."""

JOINED = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "add_k_proj": "text", "add_v_proj": "text"}
"""Projections that are one matrix in our attention, in the order of their rows."""


def peer(spec: UNetSpec, *, in_channels: int, out_channels: int) -> UNet2DConditionModel:
    """diffusers' UNet with the blocks of UNet(spec, ...), told timesteps and caption states."""
    return UNet2DConditionModel(in_channels=in_channels, out_channels=out_channels, **options_of(spec))


def options_of(spec: UNetSpec) -> dict[str, Any]:
    """How diffusers is told of the blocks of UNet(spec, ...)."""
    attends = [factor in spec.attention_at for factor in spec.factors()]
    down = ["SimpleCrossAttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends]
    up = ["SimpleCrossAttnUpBlock2D" if attend else "ResnetUpsampleBlock2D" for attend in reversed(attends)]
    return {
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "block_out_channels": spec.channels(),
        "layers_per_block": spec.blocks_per_level,
        "norm_num_groups": spec.groups,
        "cross_attention_dim": spec.text_width,
        "attention_head_dim": spec.head_width,
        "resnet_time_scale_shift": "scale_shift" if spec.scale_shift else "default",
    }


def as_ours(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the peer (weights or gradients) under the names of our UNet."""
    ours: dict[str, Tensor] = {}
    for their_name, tensor in theirs.items():
        name = their_name
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        for part, whole in JOINED.items():
            name = name.replace(f".{part}.", f".{whole}.")
        ours[name] = torch.cat([ours[name], tensor]) if name in ours else tensor
    return ours
