"""DDPM's layout, in which its networks were published for PyTorch beside the code of DDIM.

Source: the published code of Song et al. 2021 (arXiv:2010.02502), `models/diffusion.py`.
"""

from collections.abc import Iterator

from torch import nn

from dd_core.layouts.moves import Move, layer, layers, unfolded, within
from dd_core.nets.layers import Attention, ResBlock, Resized
from dd_core.nets.unet import Block, Down, UNet, Up


def unet_moves(net: UNet) -> Iterator[Move]:
    """All of a UNet; levels are numbered by their size on both ways, ours in the order of the way."""
    names = {"conv_in": "stem", "norm_out": "norm", "conv_out": "out"}
    names |= {"temb.dense.0": "hearing.level_in", "temb.dense.1": "hearing.level_out"}
    yield from layers(names)
    last = len(net.down) - 1
    for place, (down, up) in enumerate(zip(net.down, net.up, strict=True)):
        assert isinstance(down, Down)
        assert isinstance(up, Up)
        for way, number, level, resize in (
            ("down", place, down, down.shrink),
            ("up", last - place, up, up.grow),
        ):
            theirs, ours = f"{way}.{number}.", f"{way}.{place}."
            for index, block in enumerate(level.blocks):
                moves = block_moves(block, f"block.{index}", f"attn.{index}", f"blocks.{index}.")
                yield from within(moves, theirs=theirs, ours=ours)
            if resize is not None:
                assert isinstance(resize, Resized)
                resized = ("downsample", "shrink") if way == "down" else ("upsample", "grow")
                yield from layer(f"{theirs}{resized[0]}.conv", f"{ours}{resized[1]}.conv")
    yield from within(block_moves(net.middle, "block_1", "attn_1", "middle."), theirs="mid.")
    yield from residual_moves(net.middle_out, "mid.block_2", "middle_out")


def block_moves(block: nn.Module, residual: str, attention: str, ours: str) -> Iterator[Move]:
    """A residual block and the attention after it, if any."""
    assert isinstance(block, Block)
    yield from residual_moves(block.residual, residual, f"{ours}residual")
    if isinstance(block.attention, Attention):
        place, parts = f"{ours}attention", tuple(f"{attention}.{part}" for part in "qkv")
        yield from layer(f"{attention}.norm", f"{place}.norm")
        yield from layer(parts, f"{place}.qkv", unfolded(2))
        yield from layer(f"{attention}.proj_out", f"{place}.out", unfolded(2))


def residual_moves(block: ResBlock, theirs: str, ours: str) -> Iterator[Move]:
    """A residual block."""
    names = {
        "norm1": "norm_in",
        "conv1": "conv_in",
        "temb_proj": "level",
        "norm2": "norm_out",
        "conv2": "conv_out",
    }
    if isinstance(block.shortcut, nn.Conv2d):
        names["nin_shortcut"] = "shortcut"
    yield from layers(names, f"{theirs}.", f"{ours}.")
