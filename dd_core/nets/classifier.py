"""The noised classifier: the way down of a UNet, then attention pooling of the lowest map.

Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4 and appendix H; the pool is that of CLIP
(Radford et al. 2021, arXiv:2103.00020, section 2.4).
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.denoiser import Conditioning
from dd_core.nets.attention import attend
from dd_core.nets.conv import Conv
from dd_core.nets.layers import ResBlock, Told
from dd_core.nets.norm import Norm
from dd_core.nets.unet import Block, Hearing, UNetSpec, check_told, way_down
from dd_core.spec import Spec


class ClassifierSpec(Spec):
    """Size of a classifier of noisy images."""

    kind: Literal["classifier"] = "classifier"
    unet: UNetSpec
    """The UNet whose way down is used: told nothing but the noise level, `stem` conv, `factors` that divide
    image_size."""
    image_size: int = Field(ge=8)
    in_channels: int = Field(3, ge=1)
    classes: int = Field(1000, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> "ClassifierSpec":
        if self.image_size % self.unet.factors()[-1] or self.unet.stem != "conv":
            raise ValueError(
                f"image_size {self.image_size} must divide by {self.unet.factors()[-1]}, stem conv"
            )
        return self


class Classifier(nn.Module):
    """Noisy image and noise level -> logits."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec
        unet, channels = spec.unet, spec.unet.channels()
        self.hearing = Hearing(unet)
        self.stem = Conv(spec.in_channels, channels[0], 3, padding=1)
        self.down = way_down(unet)
        self.middle = Block(channels[-1], channels[-1], unet.shared(), attend=unet.attention_in_middle)
        self.middle_out = ResBlock(channels[-1], channels[-1], unet.shared())
        self.norm = Norm(channels[-1], unet.groups, unet.epsilon)
        side = spec.image_size // unet.factors()[-1]
        self.pool = AttentionPool(channels[-1], unet.shared().heads_of(channels[-1]), side**2, spec.classes)

    def forward(
        self, x: Float[Tensor, " b c h w"], log_sigma: Float[Tensor, " b"]
    ) -> Float[Tensor, " b classes"]:
        """Logits of each image.

        Args:
            x: Noisy images of `image_size`, scaled to about unit variance.
            log_sigma: Noise level of each, or another measure of it; see `UNetSpec.level_scale`.
        """
        check_told(self.spec.unet, x, Conditioning())
        told = Told(self.hearing(log_sigma, Conditioning()))
        h = self.stem(x.to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last))
        for level in self.down:
            h = level(h, told)[-1]
        h = self.middle_out(self.middle(h, told), told)
        return self.pool(self.norm(h)).to(x.dtype)


class AttentionPool(nn.Module):
    """Attention pooling: the mean of a map is the query; keys are the mean and all pixels."""

    def __init__(self, channels: int, heads: int, pixels: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.places = nn.Parameter(torch.randn(pixels + 1, channels) / channels**0.5)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, out)

    def forward(self, x: Float[Tensor, " b c h w"]) -> Float[Tensor, " b o"]:
        rows = x.flatten(2).mT
        rows = torch.cat([rows.mean(1, keepdim=True), rows], dim=1) + self.places
        parts = self.qkv(rows).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = attend(query[:, :, :1], key, value)
        return self.out(seen.transpose(1, 2).flatten(2))[:, 0]
