"""CLIP's layout, that of OpenAI and of open_clip alike: the names are those of our towers.

What no key shows, heads and activation, follows from the declared model; OpenAI's own weights need
quick GELU whatever open_clip's model of that size uses.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dd_core.layouts.moves import SAME, LayoutError, Move, fitted, inward, layer, layers, tensor, within
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.towers import open_clip

NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's files hold beside the weights."""
MASK = "attn_mask"
"""The causal mask; archives may hold it, but it follows from the length of captions."""
TRANSFORMERS, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
"""Where the text tower lies in the files of Stable Diffusion 1 and 2."""
UNHEARD = ("embeddings.position_ids", "text_projection", "logit_scale", MASK)
"""Beside the text tower, not loaded: tables, and what is for embeddings rather than states."""
READER_WEIGHTS = "model.safetensors"
"""Name of the weights in the folder of a text tower of transformers."""
LENGTH, VOCABULARY = 77, 49408
"""Tokens of a caption, and known ones, of every published CLIP; a finetuned one may know more."""
END_TOKEN = "<|endoftext|>"  # noqa: S105
PADS = {END_TOKEN: "end", "!": "zero"}
"""Token that pads a caption -> `ClipNetSpec.pads_with`."""
UNLIKE = ("timm_model_name", "hf_model_name", "mlp_ratio", "ls_init_value", "pool_type", "no_ln_pre")
"""Fields of open_clip's configs by which a model is no plain CLIP."""


def net_of(name: str) -> ClipNetSpec:
    """The size of a model that open_clip knows by name.

    Raises:
        ValueError: open_clip knows no such name, or the model is no plain CLIP.
    """
    config = open_clip().get_model_config(name)
    if config is None or any(
        field in config[part] for field in UNLIKE for part in ("vision_cfg", "text_cfg")
    ):
        raise ValueError(f"open_clip has no plain CLIP named {name!r}; see open_clip.list_models()")
    vision, text = config["vision_cfg"], config["text_cfg"]
    head_width = vision.get("head_width", 64)
    return ClipNetSpec(
        embedding_width=config["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        image_width=vision["width"],
        image_layers=vision["layers"],
        context_length=text["context_length"],
        text_width=text["width"],
        text_layers=text["layers"],
        head_width=head_width,
        text_heads=0 if text["heads"] * head_width == text["width"] else text["heads"],
        vocab_size=text["vocab_size"],
        quick_gelu=bool(config.get("quick_gelu")),
    )


def clip_moves(net: Clip) -> Iterator[Move]:
    """Both towers and the scale of the logits."""
    for name in net.state_dict():
        yield tensor(name.removeprefix("towers."), name)


def words_moves(blocks: int) -> Iterator[Move]:
    """The text tower of `Clip` as a text transformer of ours, whose vectors for padding CLIP has not."""
    yield tensor("towers.token_embedding.weight", "tokens.weight")
    yield tensor("towers.positional_embedding", "places")
    yield from layer("towers.ln_final", "norm")
    names = {
        "attn.out_proj": "out",
        "ln_1": "norm_attention",
        "ln_2": "norm_alone",
        "mlp.c_fc": "alone_in",
        "mlp.c_proj": "alone_out",
    }
    for number in range(blocks):
        theirs, ours = f"towers.transformer.resblocks.{number}.", f"blocks.{number}."
        for part in ("weight", "bias"):
            yield tensor(f"{theirs}attn.in_proj_{part}", f"{ours}qkv.{part}")
        yield from layers(names, theirs, ours)


def transformers_moves(net: Clip) -> Iterator[Move]:
    """The text tower as transformers names it: `CLIPTextModel`, in the files of Stable Diffusion 1."""
    yield tensor("embeddings.token_embedding.weight", "token_embedding.weight")
    yield tensor("embeddings.position_embedding.weight", "positional_embedding")
    yield from layer("final_layer_norm", "ln_final")
    for number in range(net.spec.text_layers):
        theirs, ours = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for part in ("weight", "bias"):
            names = tuple(f"{theirs}.self_attn.{one}_proj.{part}" for one in "qkv")
            yield Move(names, f"{ours}.attn.in_proj_{part}", SAME)
        yield from layer(f"{theirs}.self_attn.out_proj", f"{ours}.attn.out_proj")
        yield from layer(f"{theirs}.layer_norm1", f"{ours}.ln_1")
        yield from layer(f"{theirs}.layer_norm2", f"{ours}.ln_2")
        yield from layer(f"{theirs}.mlp.fc1", f"{ours}.mlp.c_fc")
        yield from layer(f"{theirs}.mlp.fc2", f"{ours}.mlp.c_proj")


def reader_part(state: Mapping[str, Tensor], *, first: bool) -> dict[str, Tensor]:
    """The text tower in a file of Stable Diffusion 1 (first) or 2, under its full names."""
    prefix = TRANSFORMERS if first else OPEN_CLIP
    unheard = {prefix + name for name in UNHEARD}
    return {name: t for name, t in state.items() if name.startswith(prefix) and name not in unheard}


def reader_weights(spec: ClipNetSpec, part: Mapping[str, Tensor], *, first: bool) -> dict[str, Tensor]:
    """The weights of the text tower that `reader_part` found, float32.

    Args:
        spec: Its size.
        part: As `reader_part` found it.
        first: Laid out as in Stable Diffusion 1 (transformers); else as in 2 (open_clip).

    Raises:
        LayoutError: It is laid out otherwise; the key is named.
    """
    with torch.device("meta"):
        net = Clip(spec)
    if first:
        moves = within(transformers_moves(net), theirs=TRANSFORMERS, ours="towers.")
    else:
        moves = within(clip_moves(net), theirs=OPEN_CLIP)
    return fitted(net, inward(part, moves))


def reader_of(config: Mapping[str, Any], *, pad: str) -> ClipNetSpec:
    """The text tower that a config.json of transformers' CLIPTextModel describes.

    Args:
        config: As it was read.
        pad: The token that its tokenizer fills up captions with.

    Raises:
        LayoutError: Ours has no such tower; the field is named.
    """
    width, heads = config.get("hidden_size", 512), config.get("num_attention_heads", 8)
    words = config.get("vocab_size", VOCABULARY)
    fixed = {
        "hidden_act": (config.get("hidden_act", "quick_gelu"), ("quick_gelu", "gelu")),
        "intermediate_size": (config.get("intermediate_size", 2048), (4 * width,)),
        "num_attention_heads": (heads, [n for n in range(1, width + 1) if width % n == 0]),
        "max_position_embeddings": (config.get("max_position_embeddings", LENGTH), (LENGTH,)),
        "layer_norm_eps": (config.get("layer_norm_eps", 1e-5), (1e-5,)),
        "vocab_size": (words, (max(words, VOCABULARY),)),
        "pad_token": (pad, tuple(PADS)),
    }
    for name, (value, known) in fixed.items():
        if value not in known:
            raise LayoutError(f"text_encoder: {name} is {value!r}, ours knows {', '.join(map(str, known))}")
    return ClipNetSpec(
        towers="text",
        embedding_width=width,
        context_length=LENGTH,
        text_width=width,
        text_layers=config.get("num_hidden_layers", 12),
        text_heads=heads,
        vocab_size=words,
        quick_gelu=config.get("hidden_act", "quick_gelu") == "quick_gelu",
        pads_with=PADS[pad],
    )


def transformers_weights(spec: ClipNetSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a text tower of transformers by itself, float32.

    Raises:
        LayoutError: It is laid out otherwise; the key is named.
    """
    part = {TRANSFORMERS + name.removeprefix("text_model."): weight for name, weight in state.items()}
    return reader_weights(spec, reader_part(part, first=True), first=True)


def clip_weights(spec: ClipNetSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of both towers, float32.

    Raises:
        LayoutError: It is no file of such a CLIP; the key is named.
    """
    if not any(name.startswith("visual.transformer.") for name in state):
        raise LayoutError(
            "there is no weight 'visual.transformer.*'; only CLIPs of two transformers are known"
        )
    with torch.device("meta"):
        net = Clip(spec)
    kept = {name: weight for name, weight in state.items() if name not in NUMBERS and MASK not in name}
    return fitted(net, inward(kept, clip_moves(net)))
