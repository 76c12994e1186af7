"""CLIP's layout, that of OpenAI and of open_clip alike: the names are those of our towers.

What no key shows, heads and activation, follows from the declared model; OpenAI's own weights want the
quick activation whatever open_clip's model of that size does.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dd_core.layouts.moves import LayoutError, Move, fitted, inward, tensor
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.towers import open_clip

NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""OpenAI's files say these beside the weights."""
MASK = "attn_mask"
"""Archives may hold it, and it follows from the length of captions."""
UNLIKE = ("timm_model_name", "hf_model_name", "mlp_ratio", "ls_init_value", "pool_type", "no_ln_pre")
"""What makes a model of open_clip another than CLIP's."""


def net_of(name: str) -> ClipNetSpec:
    """The size of a model that open_clip knows by name.

    Raises:
        ValueError: It knows none, or one that is no plain CLIP.
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
