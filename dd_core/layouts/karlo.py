"""Karlo's layout, the published unCLIP: prior, decoder and upsampler.

Source: the published code of Karlo v1.0 alpha; names and formulas only.
"""

from collections.abc import Iterator

from dd_core.layouts.adm import AdmLayout, unet_moves
from dd_core.layouts.glide import text_block_moves
from dd_core.layouts.moves import Move, layer, layers, regrouped, tensor, within
from dd_core.nets.prior import CausalPrior
from dd_core.nets.text import TextBlock, UnclipUNet
from dd_core.nets.unet import UNet


def decoder_moves(net: UnclipUNet) -> Iterator[Move]:
    """The decoder; tokens made of the embedding are interleaved value by value there, in sequence here."""
    unet = net.spec.unet
    yield from within(unet_moves(net.unet, AdmLayout()), theirs="model.", ours="unet.")
    yield from layer("model.text_seq_proj.0", "states")
    yield from layer("model.text_seq_proj.1", "norm")
    yield from layer("model.text_feat_proj", "caption")
    yield from layer("model.clip_emb", "unet.hearing.embedding")
    apart = regrouped(unet.text_width, unet.embedding_tokens)
    yield from layer("model.clip_tok_proj", "unet.hearing.tokens", apart)
    yield tensor("model.cf_param", "no_embedding")


def prior_moves(net: CausalPrior) -> Iterator[Move]:
    """The prior; mean and deviation of its embeddings lie in a file of their own."""
    names = {
        "time_embed.0": "level_in",
        "time_embed.2": "level_out",
        "text_enc_proj": "text_in",
        "text_emb_proj": "caption_in",
        "clip_img_proj": "noised_in",
        "final_ln": "norm",
        "out_proj": "out",
    }
    yield from layers(names, "model.")
    yield tensor("model.prd_emb", "query")
    yield tensor("model.positional_embedding", "places")
    for index, block in enumerate(net.blocks):
        assert isinstance(block, TextBlock)
        moves = text_block_moves(block)
        yield from within(moves, theirs=f"model.transformer.resblocks.{index}.", ours=f"blocks.{index}.")


def upsampler_moves(net: UNet, part: str) -> Iterator[Move]:
    """One of the two networks of the upsampler: `model_first_steps` or `model_last_step`."""
    return within(unet_moves(net, AdmLayout()), theirs=f"{part}.")
