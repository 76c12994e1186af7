"""A config.json of diffusers that ours cannot compute is refused by its field; so is ours that it cannot."""

import re
from typing import Any

import pytest

from dd_core.layouts import diffusers_autoencoder, diffusers_config
from dd_core.layouts.moves import LayoutError
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNetSpec

PLAIN = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 3,
}
TOLD = PLAIN | {
    "_class_name": "UNet2DConditionModel",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 24,
}
FIRST = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (PLAIN, {"_class_name": "UNet1DModel"}, "_class_name is 'UNet1DModel', no UNet of diffusers"),
        *(
            (PLAIN, {name: "other"}, f"{name} is 'other', ours can do {value!r} only")
            for name, value in diffusers_config.FIXED.items()
        ),
        (TOLD, {"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor is 2.0, ours can do 1 only"),
        *((TOLD, {name: 7}, f"{name} is 7, which ours cannot do") for name in diffusers_config.REFUSED),
        (TOLD, {"class_embed_type": "timestep"}, "is 'timestep', ours can do 'projection' only"),
        (PLAIN, {"attn_norm_num_groups": 4}, "attn_norm_num_groups is 4, ours can do 8 only"),
        (
            PLAIN,
            {"resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups is None, ours can do 8 only",
        ),
        (PLAIN, {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "has 'KDownBlock2D', unknown to ours"),
        (PLAIN, {"up_block_types": ["AttnDownBlock2D"] * 2}, "up_block_types has 'AttnDownBlock2D'"),
        (PLAIN, {"freq_shift": 2}, "freq_shift is 2, ours can do 0 and 1 only"),
        (PLAIN, {"downsample_padding": 3}, "downsample_padding is 3, ours can do 0 and 1 only"),
        (
            PLAIN,
            {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
            "some levels resize by residual blocks, others by convolutions",
        ),
        (PLAIN, {"attention_head_dim": [8, 8]}, "is [8, 8], ours can do one number only"),
        (TOLD, {"attention_head_dim": [2, 8]}, "is [2, 8]: neither heads nor widths are alike"),
        (TOLD, {"only_cross_attention": True}, "in the middle, which ours cannot do"),
        (TOLD, {"mid_block_only_cross_attention": True}, "in the middle, which ours cannot do"),
        (TOLD, {"only_cross_attention": [True]}, "only_cross_attention is [True], there are 2 levels"),
    ],
)
def test_a_unet_that_ours_is_not_is_refused_by_its_field(
    config: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    diffusers_config.spec_of(config)
    with pytest.raises(LayoutError, match=rf"^config\.json: .*{re.escape(said)}"):
        diffusers_config.spec_of(config | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny', no autoencoder"),
        *(
            ({name: 7}, f"{name} is 7, ours can do {value!r} only")
            for name, value in diffusers_autoencoder.REQUIRED.items()
        ),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "of which ours knows the plain ones only"),
        ({"block_out_channels": [32, 48]}, "block_out_channels [32, 48] are no multiples of the first"),
        ({"vq_embed_dim": 7}, "vq_embed_dim is not latent_channels, 4"),
        ({"vq_embed_dim": 4, "_class_name": "VQModel"}, "vq_embed_dim is not latent_channels, 3"),
    ],
)
def test_an_autoencoder_that_ours_is_not_is_refused_by_its_field(change: dict[str, Any], said: str) -> None:
    diffusers_autoencoder.spec_of(FIRST)
    with pytest.raises(LayoutError, match=rf"^config\.json: .*{re.escape(said)}"):
        diffusers_autoencoder.spec_of(FIRST | change)


@pytest.mark.parametrize("learned", [True, False])
def test_channels_that_contradict_the_variance_are_refused(learned: bool) -> None:
    unet = diffusers_config.spec_of(PLAIN).unet
    contradiction = PlainSpec(unet=unet, in_channels=3, out_channels=5 if learned else 4)
    with pytest.raises(LayoutError, match=r"make variance_type of scheduler_config\.json what the network"):
        diffusers_config.told_apart(contradiction, learned_variance=learned)


OURS = UNetSpec(
    width=32,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_at=(2,),
    head_width=16,
    level_scale=1.0,
    text_at_level=False,
)


READS = {"text_width": 24}
EMBEDS = READS | {"embedding_width": 8, "embedding_layers": 2, "embedding_tokens": 0}


@pytest.mark.parametrize(
    ("like", "name", "change"),
    [
        ({}, "stem", {"stem": "unshuffle", "stem_factor": 2}),
        ({}, "level_scale", {"level_scale": 100.0}),
        ({}, "level_told", {"level_told": True}),
        ({}, "channel_mult", {"channel_mult": (2, 2)}),
        ({}, "heads", {"heads": 2, "attention_at": (1, 2)}),
        (READS, "text_at_level", {"text_at_level": True}),
        (READS, "resample", {"resample": "conv"}),
        (EMBEDS, "embedding_width", {"text_width": 0}),
        (EMBEDS, "embedding_layers", {"embedding_layers": 1}),
        (EMBEDS, "embedding_tokens", {"embedding_tokens": 4}),
        (EMBEDS, "labels", {"labels": 3}),
    ],
)
def test_a_unet_of_ours_that_diffusers_has_not_is_refused_by_its_field(
    like: dict[str, Any], name: str, change: dict[str, Any]
) -> None:
    ours = OURS.but(**like)
    diffusers_config.config_of(PlainSpec(unet=ours), image_size=64)
    with pytest.raises(LayoutError, match=f"^diffusers has no such UNet: {name}="):
        diffusers_config.config_of(PlainSpec(unet=ours.but(**change)), image_size=64)


@pytest.mark.parametrize("change", [{"stem": 2}, {"norm": "none"}, {"attention_levels": (1,)}])
def test_an_autoencoder_of_ours_that_diffusers_has_not_is_refused(change: dict[str, Any]) -> None:
    ours = AutoencoderNetSpec(width=32, channel_mult=(1, 2), blocks=1)
    diffusers_autoencoder.config_of(ours, scale=1.0)
    with pytest.raises(LayoutError, match="no autoencoder with a stem, without norms or with attention_lev"):
        diffusers_autoencoder.config_of(ours.but(**change), scale=1.0)
