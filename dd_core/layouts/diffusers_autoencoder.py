"""The autoencoders of diffusers, AutoencoderKL and VQModel: weights and config.json, both ways.

Source: the documentation of these two classes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dd_core.layouts.moves import LayoutError, Move, folded, layer, weight, within
from dd_core.nets.autoencoder import Attention, Autoencoder, AutoencoderNetSpec, Decoder, Encoder, Level
from dd_core.nets.autoencoder import ResBlock as Residual

REQUIRED: dict[str, Any] = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "shift_factor": None,
    "latents_mean": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "norm_type": "group",
    "lookup_from_codebook": False,
}
"""Fields that a config.json may have, with the only values that ours supports."""


def autoencoder_moves(net: Autoencoder) -> Iterator[Move]:
    """Both halves; the levels of their decoder are counted from the lowest."""
    for name in ("quant_conv", "post_quant_conv"):
        yield from layer(name, name)
    if net.quantiser is not None:
        yield weight("quantize.embedding", "quantiser.vectors")
    for half in (net.encoder, net.decoder):
        prefix = "encoder." if isinstance(half, Encoder) else "decoder."
        yield from within(half_moves(half), theirs=prefix, ours=prefix)


def half_moves(half: Encoder | Decoder) -> Iterator[Move]:
    """The encoder or the decoder."""
    for theirs, ours in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
        yield from layer(theirs, ours)
    way, levels = ("down", half.down) if isinstance(half, Encoder) else ("up", half.up)
    for place, level in enumerate(levels):
        assert isinstance(level, Level)
        theirs = f"{way}_blocks.{place if way == 'down' else len(levels) - 1 - place}."
        yield from within(level_moves(level, way), theirs=theirs, ours=f"{way}.{place}.")
    yield from within(residual_moves(half.mid.block_1), theirs="mid_block.resnets.0.", ours="mid.block_1.")
    yield from within(residual_moves(half.mid.block_2), theirs="mid_block.resnets.1.", ours="mid.block_2.")
    if isinstance(half.mid.attn_1, Attention):
        yield from within(attention_moves(), theirs="mid_block.attentions.0.", ours="mid.attn_1.")


def level_moves(level: Level, way: str) -> Iterator[Move]:
    """The blocks of one size, and the module that changes to the next."""
    for index, block in enumerate(level.block):
        yield from within(residual_moves(block), theirs=f"resnets.{index}.", ours=f"block.{index}.")
    for index in range(len(level.attn)):
        yield from within(attention_moves(), theirs=f"attentions.{index}.", ours=f"attn.{index}.")
    if not isinstance(getattr(level, f"{way}sample"), nn.Identity):
        yield from layer(f"{way}samplers.0.conv", f"{way}sample.conv")


def residual_moves(block: nn.Module) -> Iterator[Move]:
    """A residual block."""
    assert isinstance(block, Residual)
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from layer(name, name)
    if isinstance(block.nin_shortcut, nn.Conv2d):
        yield from layer("conv_shortcut", "nin_shortcut")


def attention_moves() -> Iterator[Move]:
    """An attention; its projections are matrices there, 1x1 convolutions here."""
    yield from layer("group_norm", "norm")
    for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield from layer(theirs, ours, folded(2))


def config_of(spec: AutoencoderNetSpec, *, scale: float) -> dict[str, Any]:
    """The config.json of an autoencoder.

    Raises:
        LayoutError: The autoencoder has what diffusers does not support; the fields are named.
    """
    if spec.stem > 1 or spec.norm == "none" or spec.attention_levels:
        raise LayoutError(
            "diffusers has no autoencoder with a stem, without norms or with attention_levels; what was "
            "published can be exported, and what recipes at paper scale train"
        )
    levels = len(spec.channel_mult)
    config = {
        "_class_name": "VQModel" if spec.codes else "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "block_out_channels": [spec.width * mult for mult in spec.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": spec.blocks,
        "latent_channels": spec.latent_channels,
        "norm_num_groups": spec.groups,
        "mid_block_add_attention": spec.mid_attention,
        "scaling_factor": scale,
    }
    return config | ({"num_vq_embeddings": spec.codes} if spec.codes else {})


def spec_of(config: Mapping[str, Any]) -> AutoencoderNetSpec:
    """The autoencoder that a config.json describes.

    Raises:
        LayoutError: It has what ours does not support; the field is named.
    """
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "VQModel"):
        raise LayoutError(
            f"config.json: _class_name is {kind!r}, no autoencoder of diffusers that ours knows"
        )
    for name, value in REQUIRED.items():
        if config.get(name, value) != value:
            raise LayoutError(f"config.json: {name} is {config[name]!r}, ours can do {value!r} only")
    blocks = {*config["down_block_types"], *config["up_block_types"]}
    if blocks != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise LayoutError(f"config.json: blocks {sorted(blocks)}, of which ours knows the plain ones only")
    channels = config["block_out_channels"]
    if any(out % channels[0] for out in channels):
        raise LayoutError(f"config.json: block_out_channels {channels} are no multiples of the first")
    latent = config.get("latent_channels", 3 if kind == "VQModel" else 4)
    if config.get("vq_embed_dim") not in (None, latent):
        raise LayoutError(f"config.json: vq_embed_dim is not latent_channels, {latent}")
    return AutoencoderNetSpec(
        width=channels[0],
        channel_mult=tuple(out // channels[0] for out in channels),
        blocks=config.get("layers_per_block", 1),
        mid_attention=config.get("mid_block_add_attention", True),
        groups=config.get("norm_num_groups", 32),
        latent_channels=latent,
        codes=config.get("num_vq_embeddings", 256) if kind == "VQModel" else 0,
    )
