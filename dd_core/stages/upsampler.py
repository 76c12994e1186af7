"""The upsampler: a small image -> the same image at several times the size.

Trained on crops: the crop is made small by averaging and noised, since the base's pictures are not
perfect either, and the network, told the small crop, learns the large one.  It is not told the caption.

Sources: Ho et al. 2021 (arXiv:2106.15282, cascades, noise on the small image), Ramesh et al. 2022
(arXiv:2204.06125, section 2.1, crops, no attention, no caption).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core import edits, images, losses
from dd_core.cascade import CascadeState, Draw
from dd_core.denoiser import Conditioning, Denoiser, NetworkDenoiser
from dd_core.guidance import Rows, bounded, classifier_free, rows_of
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.noise import SeededNoise, spread
from dd_core.samplers import SamplingSpec, begin, sigmas_of
from dd_core.schedules import refuse_falling
from dd_core.stage import LearnedSpec, Losses, PairBatch, Stage, Trained
from dd_core.stages.known import known_of, refuse_known
from dd_core.stages.refusals import refuse_edit, refuse_small, refuse_unheard, refuse_weights


class UpsamplerSpec(LearnedSpec):
    """Upsampler: small image -> image_size x image_size RGB."""

    kind: Literal["upsampler"] = "upsampler"
    net: UNetSpec
    image_size: int = Field(256, ge=16)
    factor: int = Field(4, ge=2)
    """How many times larger the image becomes."""
    crop: int = Field(64, ge=16)
    """Side of the crops of the large image that it trains on."""
    log_sigma_mean: float = -1.0
    log_sigma_std: float = Field(1.4, gt=0)
    weight_range: tuple[float, float] = (0.05, 5.0)
    roughness: float = Field(0.1, ge=0)
    """Largest standard deviation of the noise on the small image in training; each crop draws its own."""
    sigma_min: float = Field(0.02, gt=0)
    sigma_max: float = Field(20.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "UpsamplerSpec":
        refuse_falling(self.sigma_min, self.sigma_max)
        refuse_weights(self.weight_range)
        side, crop, grid = self.image_size, self.crop, self.factor * self.net.factors()[-1]
        if side % self.factor:
            raise ValueError(f"image_size {side} must divide by factor {self.factor}")
        if crop > side:
            raise ValueError(f"crop {crop} is larger than image_size {side}; make it smaller")
        if crop % grid:
            raise ValueError(f"crop {crop} must divide by {grid}, what the network and factor make small")
        return self


class Refiner(nn.Module):
    """A UNet that predicts the residual to the enlarged image, so that an untrained one already enlarges."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.unet = UNet(spec, in_channels=3, out_channels=3)

    def forward(
        self, x: Float[Tensor, " b 3 h w"], log_sigma: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b 3 h w"]:
        assert cond.image is not None
        lacking: Tensor = self.unet(x, log_sigma, cond)
        return lacking + cond.image


class UpsamplerStage(Stage):
    """Trains the upsampler on random crops."""

    model: NetworkDenoiser[Refiner]

    def __init__(self, spec: UpsamplerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = denoiser_of(spec)

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        spec = self.spec
        x0 = images.to_unit(images.crops(batch.image, spec.crop, grid=spec.factor))
        small = F.avg_pool2d(x0, spec.factor)
        level = spec.roughness * torch.rand_like(small[:, 0, 0, 0])
        small = small + spread(level, small) * torch.randn_like(small)
        cond = Conditioning(image=enlarged(small, spec.factor))
        sigma = torch.exp(spec.log_sigma_mean + spec.log_sigma_std * torch.randn_like(level))
        x0_mse = losses.x0_mse(self.model, x0, sigma, cond)
        weight = sigma.pow(-2).clamp(*spec.weight_range)
        return Losses((weight * x0_mse).mean(), {"x0_mse": x0_mse.detach().mean()})


class UpsamplerHop:
    """Small image -> large image; with something known of it in the state, an edit."""

    def __init__(self, trained: Trained, *, device: torch.device | str) -> None:
        assert isinstance(trained.spec, UpsamplerSpec)
        self.spec, self.device = trained.spec, torch.device(device)
        self.model = denoiser_of(trained.spec)
        self.model.load_state_dict(trained.weights)
        self.model.eval().requires_grad_(False).to(self.device)

    def refuse(self, state: CascadeState, how: SamplingSpec) -> None:
        refuse_unheard(how, "upsampler")
        refuse_edit(how, state, has_channels=False)
        refuse_known(state, self.spec.image_size)
        sigmas_of(how, sigma_min=self.spec.sigma_min, sigma_max=self.spec.sigma_max)

    def start(self, state: CascadeState, how: SamplingSpec) -> Draw:
        self.refuse(state, how)
        refuse_small(self.spec.image_size, self.spec.factor, state.image)
        assert state.image is not None
        spec, noise = self.spec, SeededNoise(state.seeds, f"{self.spec.image_size} px")
        sigmas = sigmas_of(how, sigma_min=spec.sigma_min, sigma_max=spec.sigma_max)
        large = enlarged(state.image.to(self.device), spec.factor)
        x = spec.sigma_max * noise(large)
        known = known_of(state, spec.image_size, self.device)
        sampling = begin(how, x if known is None else x + known.image, sigmas, noise)
        if known is not None:
            sampling = edits.edited(sampling, known.edit)
        cond = Conditioning(image=large)
        return Draw(sampling, rows_of(how, cond, cond, len(x))._replace(scale=torch.ones(len(x))))

    def denoiser(self, rows: Rows) -> Denoiser:
        return bounded(classifier_free(self.model, rows), rows)

    def finish(self, state: CascadeState, x0: Tensor) -> CascadeState:
        return state._replace(image=images.quantised(x0.float().cpu()))


def denoiser_of(spec: UpsamplerSpec) -> NetworkDenoiser[Refiner]:
    """The network of an upsampler, seen as a denoiser."""
    return NetworkDenoiser(Refiner(spec.net), "x0")


def enlarged(small: Float[Tensor, " b 3 h w"], factor: int) -> Float[Tensor, " b 3 H W"]:
    """The small image at the large size, bicubic, as the network is told it."""
    return F.interpolate(small, scale_factor=factor, mode="bicubic")
