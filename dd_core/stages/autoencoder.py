"""The autoencoder: an image to a few numbers per patch and back, the first stage of latent diffusion.

Two players: the model minimises absolute error, a perceptual distance and a weak pull of the latents
towards the normal distribution; from `disc_start` on, the discriminator tells crops of real images from
reconstructed ones, and the model is trained to deceive it.

Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G.  Where the published code
departs from the paper, this file does as follows:
- Its log variance of the pixels is in no optimizer and stays 0: left out here.
- With a Gaussian its losses are sums over the values of an image; here all of them are divided by the number
  of values, so that learning rate and clipping do not depend on the size of the crop.  With a codebook they
  are means already.  `kl_weight` and `disc_weight` keep their published meaning, and the balance is clamped
  at the published value in both cases.
- The balance with the discriminator is computed only from `disc_start` on, and its gradients are reused
  for the step: no loss is back-propagated twice.
"""

from pathlib import Path
from typing import Literal, NamedTuple, assert_never

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from dd_core import images, losses
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.perceptual import ClipFeatures, PatchGan, PatchGanSpec, PerceptualDistance, load_lpips
from dd_core.nets.quantiser import straight_through
from dd_core.ranks import gathered
from dd_core.stage import ClipNeeds, LearnedSpec, Losses, PairBatch, Stage, Trained
from dd_core.stages.clip import clip_for


class AutoencoderSpec(LearnedSpec):
    """Image <-> latent; the defaults are the published f8 z4 but for the perceptual distance."""

    kind: Literal["autoencoder"] = "autoencoder"
    net: AutoencoderNetSpec = AutoencoderNetSpec()
    image_size: int = Field(256, ge=8)
    crop: int = Field(256, ge=8)
    """Side of the random crops that it trains on, in pixels."""
    crops_per_image: int = Field(1, ge=1)
    """Crops of each image that is read; more of them when reading is slower than training."""
    square_weight: float = Field(0.0, ge=0)
    """Of the squared error added to the absolute one, 0 as published.  Where most of a picture is background,
    the absolute error alone is slow to learn the colours of small things."""
    kl_weight: float = Field(1e-6, ge=0)
    """Of the Gaussian bottleneck.  A codebook (net.codes) has the commitment in its place, with weight 1."""
    commitment: Literal["fixed", "legacy"] = "fixed"
    """Of a codebook.  fixed: its vectors follow the encoder at full weight, the encoder follows them at a
    quarter; legacy: the other way round, as in the published code."""
    perceptual: Literal["clip", "lpips", "none"] = "clip"
    """Features of the parent CLIP, LPIPS from `lpips_weights`, or pixels alone."""
    perceptual_weight: float = Field(1.0, ge=0)
    lpips_weights: str = ""
    """Safetensors file with the state of lpips.LPIPS(net="vgg")."""
    discriminator: PatchGanSpec = PatchGanSpec()
    disc_weight: float = Field(0.5, ge=0)
    disc_start: int = Field(50_001, ge=0)
    """Batches of training before the discriminator takes part."""

    @model_validator(mode="after")
    def _fits(self) -> "AutoencoderSpec":
        if self.crop > self.image_size:
            raise ValueError(f"crop {self.crop} is larger than image_size {self.image_size}")
        for name, side in (("crop", self.crop), ("image_size", self.image_size)):
            if side % self.net.factor:
                raise ValueError(f"{name} {side} must be a multiple of the net's factor {self.net.factor}")
        if self.perceptual == "lpips" and not self.lpips_weights:
            raise ValueError('perceptual "lpips" needs lpips_weights, a path; or use "clip"')
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """The parent CLIP, where its features are the distance."""
        return ("clip",) if self.perceptual == "clip" else ()

    @property
    def clip_needs(self) -> ClipNeeds | None:
        """Its image tower, where its features are the distance."""
        return ClipNeeds(pictures=True) if self.perceptual == "clip" else None

    @property
    def roles(self) -> tuple[str, ...]:
        """A parent CLIP may be named where another distance is used."""
        return ("clip", "start")

    @property
    def compares(self) -> bool:
        """True: the gradients of a forward balance the players."""
        return True

    @property
    def files(self) -> dict[str, str]:
        """The weights of LPIPS, where it is the distance."""
        return {"lpips_weights": self.lpips_weights} if self.perceptual == "lpips" else {}


class Squeezed(NamedTuple):
    """An image between encoder and decoder."""

    latent: Float[Tensor, " b z i j"]
    """What goes to the decoder, unscaled."""
    cost: Float[Tensor, ""]
    """The bottleneck's loss, weighted."""
    parts: dict[str, Float[Tensor, ""]]
    observed: Float[Tensor, " b z i j"]
    """The latent that a diffusion model will paint, before scaling."""


class AutoencoderStage(Stage):
    """Trains the model in phase "model" and the discriminator in phase "discriminator", in turn.

    Args:
        spec: What to build.
        clip: The parent, if the perceptual distance is that of CLIP.

    Raises:
        ValueError: The parent is missing, or the LPIPS weights cannot be used.
    """

    model: Autoencoder
    phases = ("model", "discriminator")
    batches: Tensor
    """Batches that the model was trained on, one an optimizer step.  A buffer, so that a resumed run lets the
    discriminator in at the same batch as an unbroken one."""

    def __init__(self, spec: AutoencoderSpec, clip: Trained | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.model = Autoencoder(spec.net)
        self.discriminator = PatchGan(spec.discriminator)
        self.register_buffer("batches", torch.tensor(0))
        self.codes_begun = False
        self.freeze(perceptual_of(spec, clip))

    def has_begun(self) -> None:
        self.codes_begun = True

    def after_step(self) -> None:
        self.batches += 1

    def players(self, phase: str) -> list[nn.Parameter]:
        """The parameters that a phase trains."""
        assert phase in self.phases, phase
        return list((self.model if phase == "model" else self.discriminator).parameters())

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        image = images.crops(images.to_unit(batch.image), self.spec.crop, count=self.spec.crops_per_image)
        if phase == "discriminator":
            return self.judge(image)
        playing = bool(self.batches >= self.spec.disc_start)
        squeezed = self.bottleneck(image)
        x0_hat = self.model.generate(squeezed.latent, quantise=False)
        if self.training:
            self.model.observe(squeezed.observed)
        if playing and torch.is_grad_enabled():
            total, parts = self.deceive(x0_hat, image)
        else:
            total, parts = self.reconstruction(x0_hat, image)
        error = (x0_hat.detach().clamp(-1, 1) - image).square().mean()
        parts |= squeezed.parts | {"psnr": 10 * torch.log10(4 / error.clamp(min=1e-12))}
        return Losses(total + squeezed.cost, parts)

    def bottleneck(self, image: Float[Tensor, " b 3 h w"]) -> "Squeezed":
        """An image through the Gaussian or the codebook."""
        if self.model.quantiser is None:
            posterior = self.model.posterior(image)
            noise = torch.randn_like(posterior.mean, memory_format=torch.contiguous_format)  # on all machines
            latent, values = posterior.draw(noise), image[0].numel()
            kl = losses.kl_to_normal(posterior.mean, posterior.logvar).mean() / values
            cost = self.spec.kl_weight * kl
            return Squeezed(latent, cost, {"kl": kl.detach() * values}, posterior.mean)
        z = self.model.unquantised(image)
        if self.training and not self.codes_begun and bool(self.model.observed == 0):
            self.model.quantiser.begin(gathered(z))
        vectors, codes = self.model.quantiser(z)
        commitment = losses.vq_commitment(z, vectors, form=self.spec.commitment).mean()
        used = torch.zeros(self.spec.net.codes, device=z.device).index_fill(0, codes.flatten(), 1).mean()
        parts = {"commitment": commitment.detach(), "used": used}
        return Squeezed(straight_through(z, vectors), commitment, parts, z)

    def reconstruction(
        self, x0_hat: Float[Tensor, " b 3 h w"], image: Float[Tensor, " b 3 h w"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Absolute error, squared error and perceptual distance."""
        error = x0_hat - image
        l1, square = error.abs().mean(), error.square().mean()
        distance: PerceptualDistance = self.frozen[0]
        perceptual = distance(x0_hat, image).mean()
        parts = {"l1": l1.detach(), "perceptual": perceptual.detach()}
        return l1 + self.spec.square_weight * square + self.spec.perceptual_weight * perceptual, parts

    def deceive(
        self, x0_hat: Float[Tensor, " b 3 h w"], image: Float[Tensor, " b 3 h w"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Reconstruction and adversarial loss, balanced by their gradients at the decoder's last layer.

        Both losses are back-propagated once, to the reconstructed image; their combined gradient then reaches
        the model through a surrogate loss that is linear in the image and has the value of both.
        """
        leaf = x0_hat.detach().requires_grad_()
        reconstruction, parts = self.reconstruction(leaf, image)
        still = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        adversarial = -functional_call(self.discriminator, still, (leaf,)).mean()
        (pull,) = torch.autograd.grad(reconstruction, leaf)
        (push,) = torch.autograd.grad(adversarial, leaf)
        last = self.model.decoder.conv_out.weight
        summed = image[0].numel() if self.model.quantiser is None else 1  # values in a published loss's sum
        (pull_last,) = torch.autograd.grad(x0_hat, last, summed * pull, retain_graph=True)
        (push_last,) = torch.autograd.grad(x0_hat, last, push, retain_graph=True)
        balance = self.spec.disc_weight * losses.adaptive_weight(pull_last, push_last)
        value = (reconstruction + balance / summed * adversarial).detach()
        linear = (x0_hat * (pull + balance / summed * push)).sum()
        parts |= {"adversarial": adversarial.detach(), "balance": balance}
        return value + linear - linear.detach(), parts

    def judge(self, image: Float[Tensor, " b 3 h w"]) -> Losses:
        """The discriminator's loss; zero until it takes part."""
        if not self.batches >= self.spec.disc_start:
            idle = sum((weight.sum() for weight in self.discriminator.parameters()), torch.tensor(0.0)) * 0
            return Losses(idle, {})
        with torch.no_grad():
            x0_hat = self.model.generate(self.bottleneck(image).latent, quantise=False)
        real, fake = self.discriminator(image), self.discriminator(x0_hat)
        parts = {"real": real.detach().mean(), "fake": fake.detach().mean()}
        return Losses(losses.hinge(real, fake), parts)


class Pixels(nn.Module):
    """No perceptual distance: zero for every pair."""

    def forward(
        self, image: Float[Tensor, " b 3 h w"], reference: Float[Tensor, " b 3 h w"]
    ) -> Float[Tensor, " b"]:
        return torch.zeros(len(image), device=image.device)


def perceptual_of(spec: AutoencoderSpec, clip: Trained | None) -> nn.Module:
    """The perceptual distance that a spec names."""
    match spec.perceptual:
        case "clip":
            if clip is None:
                raise ValueError(
                    "autoencoder: needs the parent 'clip'; train it first or set perceptual: none"
                )
            assert spec.clip_needs is not None
            return ClipFeatures(clip_for(spec.kind, spec.clip_needs, clip))
        case "lpips":
            return load_lpips(Path(spec.lpips_weights))
        case "none":
            return Pixels()
        case _:
            assert_never(spec.perceptual)


def autoencoder_of(trained: Trained) -> Autoencoder:
    """A trained autoencoder, ready to use.

    Raises:
        ValueError: It is another stage.
    """
    if not isinstance(trained.spec, AutoencoderSpec):
        raise ValueError(f"the parent 'autoencoder' is a {type(trained.spec).__name__}")
    model = Autoencoder(trained.spec.net)
    model.load_state_dict(trained.weights)
    return model.eval().requires_grad_(False)
