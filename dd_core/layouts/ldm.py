"""Latent diffusion's layout: one file of UNet, autoencoder and text model, each under its prefix.

Source: the published code of Rombach et al. 2022 (arXiv:2112.10752) and of Stable Diffusion.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from dd_core.layouts.adm import AdmLayout, unet_moves
from dd_core.layouts.moves import LayoutError, Move, layer, tensor
from dd_core.nets.autoencoder import Autoencoder
from dd_core.nets.unet import UNet

UNET, AUTOENCODER, AVERAGED = "model.diffusion_model.", "first_stage_model.", "model_ema."
READERS = ("cond_stage_model.", "embedder.", "noise_augmentor.", "low_scale_model.")
"""Prefixes of the encoders of captions and images for the UNet."""
SCALE = "scale_factor"
"""Key of the latents' scale: one over the deviation of the first batch of training, where it was measured."""
SCHEDULE = ("betas", "alphas", "sqrt_", "log_one_minus_", "posterior_", "lvlb_", "logvar", SCALE)
"""Keys of tables that follow from the schedule, of each step's weight in the loss, of the latents' scale."""


def ldm_unet_moves(net: UNet, how: AdmLayout) -> Iterator[Move]:
    """The UNet; an image embedding goes through two layers."""
    yield from unet_moves(net, how)
    if net.spec.embedding_width:
        yield from layer("label_emb.0.0", "hearing.embedding.0")
        yield from layer("label_emb.0.2", "hearing.embedding.2")


def autoencoder_moves(net: Autoencoder) -> Iterator[Move]:
    """The autoencoder, whose names we have kept; the moments of its latents are ours."""
    for name in net.state_dict():
        if name == "quantiser.vectors.weight":
            yield tensor("quantize.embedding.weight", name)
        elif name not in ("moments", "observed"):
            yield tensor(name, name)


def unet_part(state: Mapping[str, Tensor], *, averaged: bool) -> dict[str, Tensor]:
    """The UNet of a whole file, under its own names; averaged weights have no dots in theirs.

    Raises:
        LayoutError: The file has no UNet, or averaged weights that are not those of its UNet.
    """
    names = [name.removeprefix(UNET) for name in state if name.startswith(UNET)]
    if not names:
        raise LayoutError(f"there is no weight {UNET}*; is it a file of latent diffusion?")
    if not averaged:
        return {name: state[UNET + name] for name in names}
    part: dict[str, Tensor] = {}
    for name in names:
        key = AVERAGED + "diffusion_model" + name.replace(".", "")
        if key not in state:
            raise LayoutError(f"there is no weight {key!r}; take the weights that are not averaged")
        part[name] = state[key]
    return part


def autoencoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder of a whole file, or of one of its own, without the loss it was trained by."""
    whole = any(name.startswith(AUTOENCODER) for name in state)
    prefix = AUTOENCODER if whole else ""
    part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    dropped = ("loss.", "model_ema.")
    return {name: t for name, t in part.items() if not name.startswith(dropped)}


def measured_scale(state: Mapping[str, Tensor]) -> float | None:
    """What latents are multiplied by, as it was measured in training; None: the file does not say."""
    return float(state[SCALE]) if SCALE in state else None


def has_averaged(state: Mapping[str, Tensor]) -> bool:
    """Whether averaged weights of the UNet are in the file, too.

    Files whose only UNet is the averaged one (emaonly) may still contain the decay, `model_ema.decay`.
    """
    return any(name.startswith(f"{AVERAGED}diffusion_model") for name in state)


def left_over(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What a whole file holds beside UNet and autoencoder: how many weights of its readers and of others.

    Raises:
        LayoutError: A key that belongs to nothing known.
    """
    counts = {"readers": 0, "averaged": 0, "schedule": 0}
    for name in state:
        if name.startswith(READERS):
            counts["readers"] += 1
        elif name.startswith(AVERAGED):
            counts["averaged"] += 1
        elif name.startswith(SCHEDULE):
            counts["schedule"] += 1
        elif not name.startswith((UNET, AUTOENCODER)):
            raise LayoutError(f"weight {name!r} belongs to nothing that latent diffusion is made of")
    return counts
