"""The config.json of diffusers' UNets, both ways.

A UNet that is told no caption is a UNet2DModel there, any other a UNet2DConditionModel, in which
"attention_head_dim" is, by an old mistake that its files keep, the number of heads of a transformer.

Source: the documentation of these two classes.
"""

from collections.abc import Mapping
from typing import Any, Literal

from dd_core.layouts.moves import LayoutError
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNetSpec

Config = dict[str, Any]
FIXED: Config = {
    "act_fn": "silu",
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}
"""Fields that a config.json may have, with the only values that ours supports."""
REFUSED = (
    "addition_embed_type",
    "attention_type",
    "class_embeddings_concat",
    "cross_attention_norm",
    "dual_cross_attention",
    "encoder_hid_dim",
    "resnet_skip_time_act",
    "reverse_transformer_layers_per_block",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
    "time_embedding_dim",
    "timestep_post_act",
)
"""Fields that ours does not support; they must be absent, null, false or "default"."""
UNTOLD = {"residual": ("Resnet{}sampleBlock2D", "Attn{}Block2D"), "conv": ("{}Block2D", "Attn{}Block2D")}
"""Blocks of a level without and with attention, if not told a caption."""
TOLD = {
    "residual": ("Resnet{}sampleBlock2D", "SimpleCrossAttn{}Block2D"),
    "conv": ("{}Block2D", "CrossAttn{}Block2D"),
}


def config_of(spec: PlainSpec, *, image_size: int, linear: bool = True) -> Config:
    """The config.json of a UNet; `linear` is its `use_linear_projection`.

    Raises:
        LayoutError: The UNet has what diffusers does not support; the field is named.
    """
    unet = spec.unet
    check_expressible(unet)
    blocks = (TOLD if unet.text_width else UNTOLD)[unet.resample]
    down = [blocks[factor in unet.attention_at].format("Down") for factor in unet.factors()]
    up = [blocks[factor in unet.attention_at].format("Up") for factor in unet.factors()[::-1]]
    config: Config = FIXED | {
        "_class_name": "UNet2DConditionModel" if unet.text_width else "UNet2DModel",
        "sample_size": image_size,
        "in_channels": spec.in_channels + unet.image_channels,
        "out_channels": spec.out_channels,
        "block_out_channels": list(unet.channels()),
        "layers_per_block": unet.blocks_per_level,
        "down_block_types": down,
        "up_block_types": up,
        "norm_num_groups": unet.groups,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
        "dropout": unet.dropout,
        "num_class_embeds": unet.labels or None,
        "flip_sin_to_cos": not unet.sine_first,
        "freq_shift": unet.freq_shift,
        "downsample_padding": 0 if unet.pads == "after" else 1,
        "norm_eps": unet.epsilon,
    }
    return config | (told_config(unet, linear=linear) if unet.text_width else plain_config(unet))


def check_expressible(unet: UNetSpec) -> None:
    """Refuse what a config.json of diffusers cannot express."""
    told, embedded = bool(unet.text_width), bool(unet.embedding_width)
    refused = {
        "stem": unet.stem != "conv",
        "level_scale": unet.level_scale != 1,
        "level_told": unet.level_told,
        "channel_mult": unet.channel_mult[0] != 1,
        "text_at_level": told and unet.text_at_level,
        "embedding_width": embedded and not told,
        "embedding_layers": embedded and unet.embedding_layers != 2,
        "embedding_tokens": embedded and told and unet.embedding_tokens > 0,
        "resample": told and (unet.resample == "conv") != (unet.attention == "cross"),
        "labels": embedded and unet.labels > 0,
        "heads": unet.attention == "joint" and len(head_widths(unet)) > 1 and (told or unet.heads > 1),
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise LayoutError(
                f"diffusers has no such UNet: {name}={getattr(unet, name)!r}; what was published can be "
                "exported, and what recipes at paper scale train"
            )


def head_widths(unet: UNetSpec) -> set[int]:
    """Widths of the heads, over all levels that attend."""
    attending = {*unet.attention_at, *unet.factors()[-1:] * unet.attention_in_middle}
    levels = zip(unet.channels(), unet.factors(), strict=True)
    return {out // unet.shared().heads_of(out) for out, factor in levels if factor in attending}


def plain_config(unet: UNetSpec) -> Config:
    """The further fields of a UNet2DModel."""
    kind = "resnet" if unet.resample == "residual" else "conv"
    return {
        "add_attention": unet.attention_in_middle,
        "attn_norm_num_groups": unet.groups,  # otherwise the middle attends without a norm
        "attention_head_dim": None if unet.heads == 1 else next(iter(head_widths(unet)), 8),
        "downsample_type": kind,
        "upsample_type": kind,
    }


def told_config(unet: UNetSpec, *, linear: bool) -> Config:
    """The further fields of a UNet2DConditionModel."""
    config: Config = {"cross_attention_dim": unet.text_width}
    if unet.attention == "cross":
        config |= {
            "attention_head_dim": [unet.shared().heads_of(out) for out in unet.channels()],
            "transformer_layers_per_block": unet.transformer_depth,
            "use_linear_projection": linear,
            "only_cross_attention": [factor in unet.text_only_at for factor in unet.factors()],
        }
    else:
        config |= {"attention_head_dim": next(iter(head_widths(unet)), 8)}
    simple = "CrossAttn" if unet.attention == "cross" else "SimpleCrossAttn"
    config |= {"mid_block_type": f"UNetMidBlock2D{simple if unet.attention_in_middle else ''}"}
    if unet.embedding_width:
        config |= {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": unet.embedding_width,
        }
    return config


def spec_of(config: Mapping[str, Any]) -> PlainSpec:
    """The UNet that a config.json describes.

    Raises:
        LayoutError: It has what ours does not support; the field is named.
    """
    check_understood(config)
    told = config["_class_name"] == "UNet2DConditionModel"
    channels, down = config["block_out_channels"], config["down_block_types"]
    factors = [2**level for level in range(len(channels))]
    cross = told and resampling(config) == "conv"
    unet = UNetSpec(
        width=channels[0],
        channel_mult=tuple(out / channels[0] for out in channels),
        blocks_per_level=config.get("layers_per_block", 2),
        attention_at=tuple(f for f, kind in zip(factors, down, strict=True) if "Attn" in kind),
        attention_in_middle=attends_in_middle(config),
        attention="cross" if cross else "joint",
        transformer_depth=config.get("transformer_layers_per_block", 1) if cross else 1,
        text_only_at=tuple(f for f, only in zip(factors, only_text(config), strict=True) if only),
        resample=resampling(config),
        groups=config.get("norm_num_groups", 32),
        scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        dropout=config.get("dropout", 0.0),
        level_scale=1.0,
        text_width=config.get("cross_attention_dim", 1280) if told else 0,
        text_at_level=False,
        embedding_width=config.get("projection_class_embeddings_input_dim") or 0,
        embedding_layers=2 if config.get("projection_class_embeddings_input_dim") else 1,
        embedding_tokens=0,
        labels=config.get("num_class_embeds") or 0,
        **heads_in(config, cross=cross),
        **as_in_ddpm(config),
    )
    given = {name: config[name] for name in ("in_channels", "out_channels") if name in config}
    return PlainSpec(unet=unet, **({"in_channels": 4, "out_channels": 4} | given if told else given))


def as_in_ddpm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields in which DDPM's network differs from later ones: sinusoids, padding, normalisation."""
    shift, padding = config.get("freq_shift", 0), config.get("downsample_padding", 1)
    for name, value in (("freq_shift", shift), ("downsample_padding", padding)):
        if value not in (0, 1):
            raise LayoutError(f"config.json: {name} is {value!r}, ours can do 0 and 1 only")
    return {
        "sine_first": not config.get("flip_sin_to_cos", True),
        "freq_shift": int(shift),
        "pads": "after" if padding == 0 and resampling(config) == "conv" else "around",
        "epsilon": config.get("norm_eps", 1e-5),
    }


def told_apart(spec: PlainSpec, *, learned_variance: bool) -> PlainSpec:
    """The same UNet, its input channels split into those of x, which come first, and of a picture it is told.

    Args:
        spec: From config.json, which has only the total number of input channels.
        learned_variance: Whether half of the output channels are the variance, according to the scheduler.

    Raises:
        LayoutError: The numbers of channels contradict this.
    """
    answers = 1 + learned_variance
    x, odd = divmod(spec.out_channels, answers)
    told = spec.in_channels - x
    if odd or told < 0:
        raise LayoutError(
            f"config.json: in_channels is {spec.in_channels} and out_channels {spec.out_channels}, of a "
            f"variance that is {'learned' if learned_variance else 'not learned'}: make variance_type of "
            "scheduler_config.json what the network was trained with"
        )
    return spec.but(in_channels=x, unet=spec.unet.but(image_channels=told))


def check_understood(config: Mapping[str, Any]) -> None:
    """Refuse what ours does not support."""
    if config.get("_class_name") not in ("UNet2DModel", "UNet2DConditionModel"):
        raise LayoutError(f"config.json: _class_name is {config.get('_class_name')!r}, no UNet of diffusers")
    for name, value in (FIXED | {"resnet_out_scale_factor": 1}).items():  # one that UNet2DModel has not
        if config.get(name, value) != value:
            raise LayoutError(f"config.json: {name} is {config[name]!r}, ours can do {value!r} only")
    for name in REFUSED:
        if config.get(name) not in (None, False, "default"):
            raise LayoutError(f"config.json: {name} is {config[name]!r}, which ours cannot do")
    kind = config.get("class_embed_type")
    if kind not in (None, "projection"):
        raise LayoutError(f"config.json: class_embed_type is {kind!r}, ours can do 'projection' only")
    said, groups = config.get("attn_norm_num_groups"), config.get("norm_num_groups", 32)
    silent = said is None and config.get("resnet_time_scale_shift", "default") == "default"
    if config["_class_name"] == "UNet2DModel" and said != groups and not silent:
        raise LayoutError(f"config.json: attn_norm_num_groups is {said!r}, ours can do {groups!r} only")
    check_blocks(config)


def check_blocks(config: Mapping[str, Any]) -> None:
    """Refuse types of blocks that ours does not have."""
    known = {block for pair in (*UNTOLD.values(), *TOLD.values()) for block in pair}
    for way in ("Down", "Up"):
        for block in config[f"{way.lower()}_block_types"]:
            if block not in {name.format(way) for name in known}:
                raise LayoutError(f"config.json: {way.lower()}_block_types has {block!r}, unknown to ours")


def only_text(config: Mapping[str, Any]) -> list[bool]:
    """Whether a level's transformers never attend to pixels; a config may say so of levels without any."""
    said, down = config.get("only_cross_attention") or False, config["down_block_types"]
    if said is True or config.get("mid_block_only_cross_attention"):
        raise LayoutError("config.json: only_cross_attention in the middle, which ours cannot do")
    levels = said if isinstance(said, list | tuple) else [False] * len(down)
    if len(levels) != len(down):
        raise LayoutError(f"config.json: only_cross_attention is {said!r}, there are {len(down)} levels")
    return [bool(only) and "CrossAttn" in kind for only, kind in zip(levels, down, strict=True)]


def resampling(config: Mapping[str, Any]) -> Literal["residual", "conv"]:
    """How the size changes from level to level; all levels must do it in the same way."""
    kinds: set[Literal["residual", "conv"]] = set()
    for way in ("Down", "Up"):
        for block in config[f"{way.lower()}_block_types"]:
            if block.startswith(("Resnet", "Simple")):
                kinds.add("residual")
            elif block == f"Attn{way}Block2D":
                kinds.add("residual" if config.get(f"{way.lower()}sample_type") == "resnet" else "conv")
            else:
                kinds.add("conv")
    if len(kinds) > 1:
        raise LayoutError("config.json: some levels resize by residual blocks, others by convolutions")
    return kinds.pop()


def attends_in_middle(config: Mapping[str, Any]) -> bool:
    """Whether the lowest resolution attends."""
    if config["_class_name"] == "UNet2DModel":
        return bool(config.get("add_attention", True))
    return config.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2D"


def heads_in(config: Mapping[str, Any], *, cross: bool) -> dict[str, int]:
    """`heads` or `head_width`, whichever is the same at every level."""
    said = config.get("attention_head_dim", 8)
    if said is None and config["_class_name"] == "UNet2DModel":
        return {"heads": 1}
    if not cross:
        if not isinstance(said, int):
            raise LayoutError(f"config.json: attention_head_dim is {said!r}, ours can do one number only")
        return {"head_width": said}
    counts = [said] * len(config["block_out_channels"]) if isinstance(said, int) else list(said)
    if len(set(counts)) == 1:
        return {"heads": counts[0]}
    widths = {out // count for out, count in zip(config["block_out_channels"], counts, strict=True)}
    if len(widths) > 1:
        raise LayoutError(f"config.json: attention_head_dim is {said!r}: neither heads nor widths are alike")
    return {"head_width": widths.pop()}
