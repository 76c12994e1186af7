"""ADM's layout, which GLIDE, unCLIP, latent diffusion and consistency models share: the UNet.

Source: the published code of Dhariwal & Nichol 2021 (arXiv:2105.05233); the transformer in place of the
attention as in that of Rombach et al. 2022 (arXiv:2112.10752).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import nn

from dd_core.layouts.moves import (
    SAME,
    TURNED,
    Change,
    Move,
    both,
    layer,
    layers,
    regrouped,
    tensor,
    unfolded,
    weight,
    within,
)
from dd_core.nets.classifier import Classifier
from dd_core.nets.cross import CrossTransformer
from dd_core.nets.layers import Attention, ResBlock, Resized
from dd_core.nets.unet import Block, Down, UNet, Up


class AdmLayout(NamedTuple):
    """What the keys of an ADM file do not show, or what differs between ADM's descendants."""

    order: Literal["legacy", "new"] = "legacy"
    """Rows of `qkv`: head by head, or query, key, value (ADM's model of 64 px, consistency models)."""
    attention_dims: Literal[1, 2] = 1
    """Trailing dimensions of size 1 of `qkv` and `proj_out`; consistency models have two."""
    projection: Literal["conv", "linear"] = "conv"
    """The layers into and out of a transformer; linear in Stable Diffusion 2."""


def unet_moves(net: UNet, how: AdmLayout) -> Iterator[Move]:
    """All of a UNet except the encoders of captions and embeddings."""
    yield from shared_moves(net, how)
    number = 0
    for place, level in enumerate(net.up):
        assert isinstance(level, Up)
        for index, block in enumerate(level.blocks):
            theirs = f"output_blocks.{number}"
            yield from block_moves(block, theirs, f"up.{place}.blocks.{index}", how)
            number += 1
        if level.grow is not None:
            after = 2 if block.attention is not None else 1
            yield from resizing_moves(level.grow, f"{theirs}.{after}", f"up.{place}.grow")
    yield from layer("out.0", "norm")
    yield from layer("out.2", "out")


def classifier_moves(net: Classifier, how: AdmLayout) -> Iterator[Move]:
    """The half UNet and its pool; the pool's `qkv` rows are in the new order whatever the rest has."""
    yield from shared_moves(net, how)
    yield from layer("out.0", "norm")
    yield tensor("out.2.positional_embedding", "pool.places", TURNED)
    yield from layer("out.2.qkv_proj", "pool.qkv", unfolded(1))
    yield from layer("out.2.c_proj", "pool.out", unfolded(1))


def shared_moves(net: UNet | Classifier, how: AdmLayout) -> Iterator[Move]:
    """Noise level, way down and middle."""
    yield from layer("time_embed.0", "hearing.level_in")
    yield from layer("time_embed.2", "hearing.level_out")
    if net.hearing.label is not None:
        yield weight("label_emb", "hearing.label")
    yield from layer("input_blocks.0.0", "stem")
    number = 1
    for place, level in enumerate(net.down):
        assert isinstance(level, Down)
        for index, block in enumerate(level.blocks):
            yield from block_moves(block, f"input_blocks.{number}", f"down.{place}.blocks.{index}", how)
            number += 1
        if level.shrink is not None:
            yield from resizing_moves(level.shrink, f"input_blocks.{number}.0", f"down.{place}.shrink")
            number += 1
    yield from block_moves(net.middle, "middle_block", "middle", how)
    last = 2 if net.middle.attention is not None else 1
    yield from residual_moves(net.middle_out, f"middle_block.{last}", "middle_out")


def block_moves(block: nn.Module, theirs: str, ours: str, how: AdmLayout) -> Iterator[Move]:
    """A residual block and the attention after it, if any."""
    assert isinstance(block, Block)
    yield from residual_moves(block.residual, f"{theirs}.0", f"{ours}.residual")
    match block.attention:
        case Attention():
            moves = attention_moves(block.attention, how)
        case CrossTransformer():
            moves = transformer_moves(block.attention, how)
        case _:
            return
    yield from within(moves, theirs=f"{theirs}.1.", ours=f"{ours}.attention.")


def residual_moves(block: ResBlock, theirs: str, ours: str) -> Iterator[Move]:
    """A residual block."""
    names = {
        "in_layers.0": "norm_in",
        "in_layers.2": "conv_in",
        "emb_layers.1": "level",
        "out_layers.0": "norm_out",
        "out_layers.3": "conv_out",
    }
    if isinstance(block.shortcut, nn.Conv2d):
        names["skip_connection"] = "shortcut"
    yield from layers(names, f"{theirs}.", f"{ours}.")


def resizing_moves(module: nn.Module, theirs: str, ours: str) -> Iterator[Move]:
    """The module between two levels that halves or doubles the size."""
    if isinstance(module, ResBlock):
        yield from residual_moves(module, theirs, ours)
        return
    assert isinstance(module, Resized)
    yield from layer(f"{theirs}.{'op' if module.how == 'down' else 'conv'}", f"{ours}.conv")


def attention_moves(attention: Attention, how: AdmLayout) -> Iterator[Move]:
    """A joint attention, with or without a caption."""
    heads = attention.out.in_features // attention.head_width

    def order(parts: int) -> Change:
        return regrouped(heads, parts) if how.order == "legacy" else SAME

    matrix = unfolded(how.attention_dims)
    yield from layer("norm", "norm")
    yield from layer("qkv", "qkv", both(matrix, order(3)))
    if attention.text is not None:
        yield from layer("encoder_kv", "text", both(unfolded(1), order(2)))
    yield from layer("proj_out", "out", matrix)


def transformer_moves(transformer: CrossTransformer, how: AdmLayout) -> Iterator[Move]:
    """A transformer over pixels."""
    matrix = unfolded(2) if how.projection == "conv" else SAME
    yield from layer("norm", "norm")
    yield from layer("proj_in", "enter", matrix)
    for index in range(len(transformer.layers)):
        moves = transformer_layer_moves()
        yield from within(moves, theirs=f"transformer_blocks.{index}.", ours=f"layers.{index}.")
    yield from layer("proj_out", "leave", matrix)


def transformer_layer_moves() -> Iterator[Move]:
    """One layer of a transformer over pixels; diffusers has the same names."""
    for number, name in enumerate(("norm_self", "norm_text", "norm_alone"), start=1):
        yield from layer(f"norm{number}", name)
    for theirs, ours in (("attn1", "to_self"), ("attn2", "to_text")):
        for part, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            yield weight(f"{theirs}.{part}", f"{ours}.{name}")
        yield from layer(f"{theirs}.to_out.0", f"{ours}.out")
    yield from layer("ff.net.0.proj", "alone_in")
    yield from layer("ff.net.2", "alone_out")
