"""A published network as a stage of ours: a chain, a consistency model, a classifier that leads one."""

from dd_core.consistency import FixedLevels
from dd_core.layouts.published import Layout, Process, Published
from dd_core.nets.classifier import ClassifierSpec as ClassifierNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.classifier import ClassifierSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.start import BETAS, levels_of

ENLARGED = 4
"""How many times every published network that is told a smaller picture enlarges it."""
PREFIX = "network."
"""Of the weights of a network within the model of a stage."""
KEPT_BACK = 0.1
"""Caption dropout of Stable Diffusion's training, for classifier-free guidance (its model card)."""
BICUBIC: tuple[Layout, ...] = ("karlo-sr", "karlo-sr-last")
"""Whose smaller picture is enlarged bicubically; that of the others bilinearly."""


def stage_of(source: Published) -> ChainSpec | ConsistencySpec | ClassifierSpec | None:
    """The spec of a stage with just the inputs and outputs of a published network; None if there is none.

    A network that is told captions is a chain if its text encoder is in the same file; one that is told
    embeddings is not.  Nor is the last step of Karlo's upsampler, which is no chain by itself.
    """
    match source.net:
        case PlainSpec() if source.layout != "karlo-sr-last":
            return chain_of(source, source.net)
        case ClassifierNetSpec() if isinstance(levels := levels_of(source.process), ScheduleSpec):
            return ClassifierSpec(net=source.net, schedule=levels)
        case _:
            return None


def chain_of(source: Published, net: PlainSpec) -> ChainSpec | ConsistencySpec | None:
    """`stage_of` for a UNet of ADM's family, told at most class and smaller picture, or of latents."""
    process, autoencoder, unet = source.process, source.autoencoder, net.unet
    latent = 0 if autoencoder is None else autoencoder.latent_channels
    enlarges, fills = (unet.image_channels == net.in_channels + more for more in (0, 1))
    unread = unet.text_width and source.reader is None
    shown = unet.image_channels and not (fills if latent else enlarges)  # something else
    if unread or unet.embedding_width or shown:
        return None
    chain = ChainSpec(
        net=net,
        image_size=process.image_size * (autoencoder.factor if autoencoder else 1),
        latent_channels=latent,
        factor=ENLARGED if enlarges else 1,
        enlarged_by="bicubic" if source.layout in BICUBIC else "bilinear",
        inpaints=bool(latent and fills),
        mask_of="hole" if latent and fills else "known",
        schedule=levels_of(process),
        rescaled_time=process.rescaled_time,
        predicts=process.predicts,
        loss="hybrid" if process.learned_variance else "simple",
        bound_rescaled=process.rescaled_time or process.timesteps == 1000,
        told_dropout=KEPT_BACK if unet.text_width else 0.0,
    )
    if process.predicts != "consistency":
        return chain
    return ConsistencySpec(base=chain, teacher=None, levels=FixedLevels(num_levels=40))


def process_of(chain: ChainSpec, schedule: ScheduleSpec) -> Process:
    """How the network of a chain of timesteps is called, as published networks declare it."""
    theirs = {ours: name for name, ours in BETAS.items()}
    return Process.model_validate(
        {
            "schedule": theirs[schedule.betas],
            "beta_range": (schedule.beta_start, schedule.beta_end),
            "timesteps": schedule.num_timesteps,
            "rescaled_time": chain.rescaled_time and schedule.num_timesteps != 1000,
            "predicts": chain.predicts,
            "learned_variance": chain.learns_variance,
            "last": schedule.last,
            "image_size": chain.image_size,
        }
    )
