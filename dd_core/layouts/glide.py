"""GLIDE's layout: the UNet of ADM with its text transformer, and the noised CLIP.

Source: the published code of Nichol et al. 2022 (arXiv:2112.10741).
"""

from collections.abc import Iterator

from dd_core.layouts.adm import AdmLayout, unet_moves
from dd_core.layouts.moves import Move, layer, regrouped, tensor, weight, within
from dd_core.nets.noised_clip import GlideClip
from dd_core.nets.text import CaptionedUNet, TextBlock


def captioned_moves(net: CaptionedUNet) -> Iterator[Move]:
    """Base and upsampler, also for inpainting: UNet, transformer, and the layer from one to the other."""
    yield from within(unet_moves(net.unet, AdmLayout()), ours="unet.")
    yield weight("token_embedding", "text.tokens")
    yield tensor("positional_embedding", "text.places")
    yield tensor("padding_embedding", "text.padding")
    for index, block in enumerate(net.text.blocks):
        assert isinstance(block, TextBlock)
        moves = text_block_moves(block)
        yield from within(moves, theirs=f"transformer.resblocks.{index}.", ours=f"text.blocks.{index}.")
    yield from layer("final_ln", "text.norm")
    yield from layer("transformer_proj", "unet.hearing.text")


def text_block_moves(block: TextBlock) -> Iterator[Move]:
    """A layer of a text transformer; the rows of `c_qkv` are ordered head by head."""
    yield from layer("ln_1", "norm_attention")
    yield from layer("attn.c_qkv", "qkv", regrouped(block.heads, 3))
    yield from layer("attn.c_proj", "out")
    yield from layer("ln_2", "norm_alone")
    yield from layer("mlp.c_fc", "alone_in")
    yield from layer("mlp.c_proj", "alone_out")


def noised_clip_moves(net: GlideClip) -> Iterator[Move]:
    """Both towers; they are published as two files; `imported` gives each its prefix."""
    yield tensor("image.blocks.input.w_t", "image.timesteps.weight")
    yield tensor("image.blocks.input.patch_proj", "image.patches.weight")
    yield tensor("image.blocks.input.w_pos", "image.places")
    yield from norm("image.blocks.input.ln", "image.norm_in")
    yield tensor("text.blocks.input.w_voc", "text.tokens.weight")
    yield tensor("text.blocks.input.w_pos", "text.places")
    for tower, blocks in (("image", net.image.blocks), ("text", net.text.blocks)):
        for index in range(len(blocks)):
            theirs, ours = f"{tower}.blocks.block_{index}.", f"{tower}.blocks.{index}."
            yield from within(clip_block_moves(), theirs=theirs, ours=ours)
        yield from norm(f"{tower}.blocks.output.ln", f"{tower}.norm_out")
        yield tensor(f"{tower}.blocks.output.f.w", f"{tower}.out.weight")


def clip_block_moves() -> Iterator[Move]:
    """A layer of either tower."""
    yield from norm("f_attn.ln", "norm_attention")
    yield tensor("f_attn.f_k.w", "key.weight")
    yield from norm("f_mlp.ln", "norm_alone")
    names = {
        "f_attn.f_q": "query",
        "f_attn.f_v": "value",
        "f_attn.f_c": "out",
        "f_mlp.f_1": "alone_in",
        "f_mlp.f_2": "alone_out",
    }
    for theirs, ours in names.items():
        yield tensor(f"{theirs}.w", f"{ours}.weight")
        yield tensor(f"{theirs}.b", f"{ours}.bias")


def norm(theirs: str, ours: str) -> Iterator[Move]:
    """A norm."""
    yield tensor(f"{theirs}.g", f"{ours}.weight")
    yield tensor(f"{theirs}.b", f"{ours}.bias")
