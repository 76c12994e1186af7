"""The weights of diffusers' UNets, UNet2DModel and UNet2DConditionModel, which are one network of ours."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from dd_core.layouts.adm import transformer_layer_moves
from dd_core.layouts.moves import SAME, Move, layer, layers, unfolded, weight, within
from dd_core.nets.cross import CrossTransformer
from dd_core.nets.layers import Attention, ResBlock
from dd_core.nets.unet import Block, Down, UNet, Up


def unet_moves(net: UNet, *, linear: bool) -> Iterator[Move]:
    """A UNet; `linear` is its `use_linear_projection`."""
    names = {"conv_in": "stem", "conv_norm_out": "norm", "conv_out": "out"}
    names |= {f"time_embedding.linear_{n}": f"hearing.level_{part}" for n, part in ((1, "in"), (2, "out"))}
    if net.spec.embedding_width:
        names |= {"class_embedding.linear_1": "hearing.embedding.0"}
        names |= {"class_embedding.linear_2": "hearing.embedding.2"}
    yield from layers(names)
    if net.spec.labels:
        yield weight("class_embedding", "hearing.label")
    for place, level in enumerate((*net.down, *net.up)):
        yield from level_moves(level, place % len(net.down), linear=linear)
    middle = block_moves(net.middle, 0, linear=linear)
    for move in within(middle, theirs="mid_block."):
        yield move._replace(ours=move.ours.replace("blocks.0.", "middle."))
    yield from residual_moves(net.middle_out, "mid_block.resnets.1", "middle_out")


def level_moves(level: nn.Module, place: int, *, linear: bool) -> Iterator[Move]:
    """One level of the way down or up."""
    assert isinstance(level, Down | Up)
    if isinstance(level, Down):
        way, resize, ours = "down", level.shrink, "shrink"
    else:
        way, resize, ours = "up", level.grow, "grow"
    for index, block in enumerate(level.blocks):
        moves = block_moves(block, index, linear=linear)
        yield from within(moves, theirs=f"{way}_blocks.{place}.", ours=f"{way}.{place}.")
    if isinstance(resize, ResBlock):
        yield from residual_moves(resize, f"{way}_blocks.{place}.{way}samplers.0", f"{way}.{place}.{ours}")
    elif resize is not None:
        yield from layer(f"{way}_blocks.{place}.{way}samplers.0.conv", f"{way}.{place}.{ours}.conv")


def block_moves(block: nn.Module, index: int, *, linear: bool) -> Iterator[Move]:
    """A residual block and the attention after it, if any, within its level."""
    assert isinstance(block, Block)
    yield from residual_moves(block.residual, f"resnets.{index}", f"blocks.{index}.residual")
    theirs, ours = f"attentions.{index}.", f"blocks.{index}.attention."
    match block.attention:
        case Attention():
            yield from within(attention_moves(block.attention), theirs=theirs, ours=ours)
        case CrossTransformer():
            moves = transformer_moves(block.attention, linear=linear)
            yield from within(moves, theirs=theirs, ours=ours)


def attention_moves(attention: Attention) -> Iterator[Move]:
    """An attention: their three layers are one of ours."""
    yield from layer("group_norm", "norm")
    yield from layer(("to_q", "to_k", "to_v"), "qkv")
    if attention.text is not None:
        yield from layer(("add_k_proj", "add_v_proj"), "text")
    yield from layer("to_out.0", "out")


def transformer_moves(transformer: CrossTransformer, *, linear: bool) -> Iterator[Move]:
    """A transformer over pixels, whose layers are named as in latent diffusion."""
    matrix = SAME if linear else unfolded(2)
    yield from layer("norm", "norm")
    yield from layer("proj_in", "enter", matrix)
    for index in range(len(transformer.layers)):
        moves = transformer_layer_moves()
        yield from within(moves, theirs=f"transformer_blocks.{index}.", ours=f"layers.{index}.")
    yield from layer("proj_out", "leave", matrix)


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as diffusers names them; its first releases named those of an attention differently.

    Source: `ModelMixin._convert_deprecated_attention_blocks`.
    """
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    found = dict[str, Tensor]()
    for name, tensor in state.items():
        block, _, part = name.rpartition(".attentions.")
        place, _, layer = part.partition(".")
        old, _, kind = layer.partition(".")
        is_old = bool(block) and old in renamed
        found[f"{block}.attentions.{place}.{renamed[old]}.{kind}" if is_old else name] = tensor
    return found


def residual_moves(block: ResBlock, theirs: str, ours: str) -> Iterator[Move]:
    """A residual block."""
    names = {
        "norm1": "norm_in",
        "conv1": "conv_in",
        "time_emb_proj": "level",
        "norm2": "norm_out",
        "conv2": "conv_out",
    }
    if isinstance(block.shortcut, nn.Conv2d):
        names["conv_shortcut"] = "shortcut"
    yield from layers(names, f"{theirs}.", f"{ours}.")
