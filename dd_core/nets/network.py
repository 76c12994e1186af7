"""The choice between published networks, each by the spec of its size."""

from typing import Annotated, Literal, assert_never

from pydantic import Field
from torch import nn

from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.classifier import Classifier, ClassifierSpec
from dd_core.nets.noised_clip import GlideClip, GlideClipSpec
from dd_core.nets.prior import CausalPrior, CausalPriorSpec
from dd_core.nets.text import CaptionedSpec, CaptionedUNet, UnclipSpec, UnclipUNet
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.spec import Spec


class PlainSpec(Spec):
    """A UNet by itself."""

    kind: Literal["unet"] = "unet"
    unet: UNetSpec
    in_channels: int = Field(3, ge=1)
    """Channels of x alone; `unet.image_channels` come on top."""
    out_channels: int = Field(3, ge=1)
    """Twice the channels of x if the variance is learned."""


DenoiserSpec = Annotated[
    PlainSpec | CaptionedSpec | UnclipSpec | CausalPriorSpec | ClassifierSpec | GlideClipSpec,
    Field(discriminator="kind"),
]
"""A network whose input is noisy, by the spec of its size."""
NetSpec = DenoiserSpec | AutoencoderNetSpec


def build(spec: NetSpec) -> nn.Module:
    """The network of a spec, with initial weights."""
    network: nn.Module
    match spec:
        case PlainSpec():
            network = UNet(spec.unet, in_channels=spec.in_channels, out_channels=spec.out_channels)
        case CaptionedSpec():
            network = CaptionedUNet(spec)
        case UnclipSpec():
            network = UnclipUNet(spec)
        case CausalPriorSpec():
            network = CausalPrior(spec)
        case ClassifierSpec():
            network = Classifier(spec)
        case GlideClipSpec():
            network = GlideClip(spec)
        case AutoencoderNetSpec():
            network = Autoencoder(spec)
        case _:
            assert_never(spec)
    return network
