"""The chain: a network trained on the timesteps of DDPM, or on the noise levels of EDM.

One stage for DDPM, Improved DDPM, GLIDE, ADM, EDM, the decoder of unCLIP and latent diffusion, which differ
only in their specs: the noise levels, the loss, the network, what it is told (a caption read by a
transformer of its own or by the parent CLIP, a class, an image embedding, a smaller picture, a picture with
a hole), and whether x is a picture or a latent.

Sources: Ho et al. 2020 (arXiv:2006.11239), Nichol & Dhariwal 2021 (arXiv:2102.09672), Dhariwal & Nichol 2021
(arXiv:2105.05233), Nichol et al. 2022 (arXiv:2112.10741), Ramesh et al. 2022 (arXiv:2204.06125), Rombach et
al. 2022 (arXiv:2112.10752), Karras et al. 2022 (arXiv:2206.00364).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_core import images, likelihood, losses, schedules
from dd_core.denoiser import Conditioning, NetworkDenoiser
from dd_core.nets.autoencoder import Autoencoder
from dd_core.nets.clip import Clip
from dd_core.nets.dit import DiTSpec
from dd_core.nets.text import CaptionedUNet
from dd_core.ranks import gathered
from dd_core.schedules import LogNormalSpec
from dd_core.stage import Example, Losses, PairBatch, Stage, Trained
from dd_core.stages.autoencoder import autoencoder_of
from dd_core.stages.captions import null_like
from dd_core.stages.chain_spec import ChainSpec, denoiser_of
from dd_core.stages.chain_told import encoded, heard_of, holes, kept, read_by, seen, smaller, told, unsaid
from dd_core.stages.clip import clip_for
from dd_core.stages.refusals import needed
from dd_core.stages.start import begun


class ChainStage(Stage):
    """Trains a network on the noise levels of a chain.

    Args:
        spec: What to train.
        parents: "clip" and "autoencoder" where the spec needs them; "start", if given, supplies the initial
            weights: a chain or a published network that has no image inputs beyond this chain's (weights of
            inputs that it lacks start at zero); or, those of its text transformer alone, a CLIP.

    Raises:
        ValueError: A parent is missing, or does not fit.
    """

    model: NetworkDenoiser[nn.Module]
    table: Float[Tensor, " t"] | None
    """Noise levels of the timesteps, if it has any."""

    def __init__(self, spec: ChainSpec, parents: Mapping[str, Trained]) -> None:
        super().__init__()
        self.spec = spec
        clip, autoencoder = parents_of(spec, parents)
        self.model = denoiser_of(spec)
        if "start" in parents:
            reader = None if clip is None else clip.spec
            self.model.load_state_dict(begun(spec, parents["start"], self.model.state_dict(), reader))
        if spec.text_frozen:
            assert isinstance(self.model.network, CaptionedUNet)
            self.model.network.text.requires_grad_(False).padding.requires_grad_(True)
        timed = None if isinstance(spec.schedule, LogNormalSpec) else schedules.sigmas(spec.schedule)
        self.register_buffer("table", timed, persistent=False)
        self.timesteps: likelihood.TimestepSampler | None = None
        if spec.loss == "vlb" and timed is not None:
            self.timesteps = likelihood.TimestepSampler(len(timed))
        self.freeze(*(part for part in (clip, autoencoder) if part is not None))

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        """Raises ValueError as `example` does."""
        example = self.example(batch)
        return self.loss(example.x0, example.told(self.model.network))

    def example(self, batch: PairBatch) -> Example:
        """A batch as it is trained on: pictures, crops or latents, and their conditioning after dropout.

        Raises:
            ValueError: The network is told classes, and the batch has no labels or, without a class of
                nothing (told_dropout 0), a picture has none.
        """
        spec, picture = self.spec, images.to_unit(batch.image)
        clip = next((part for part in self.frozen if isinstance(part, Clip)), None)
        autoencoder = next((part for part in self.frozen if isinstance(part, Autoencoder)), None)
        heard_whole = heard_of(spec, batch, picture, clip)
        if spec.crop:
            picture = images.crops(picture, spec.crop, grid=spec.factor)
        x0 = encoded(picture, autoencoder, noisy=True)
        heard = kept(spec, heard_whole)
        caption = read_by(spec, clip, heard.tokens)
        hole = holes(picture) if spec.inpaints else None
        shown = seen(spec, autoencoder, small=smaller(spec, picture), known=picture, hole=hole)
        nothing = unsaid(spec, heard, null_like(heard.tokens) if spec.told_dropout else heard.tokens)

        def said(network: nn.Module) -> Conditioning:
            return told(spec, network, caption, heard, shown)

        def not_said(network: nn.Module) -> Conditioning:
            silence = read_by(spec, clip, nothing.tokens) if spec.told_dropout else caption
            return told(spec, network, silence, nothing, shown)

        return Example(x0, said, not_said)

    def loss(self, x0: Float[Tensor, " b c h w"], cond: Conditioning) -> Losses:
        """The loss that the spec names, at random noise levels.

        In the hybrid loss the bound has its published weight where noise is predicted.  Where the image is
        predicted, its error does not fall with the noise, and the bound is about error / sigma^2: thousands
        at the few lowest levels, which would dominate the loss.  There its weight is sigma^2, at most 1.
        """
        spec, table = self.spec, self.table
        assert spec.predicts != "consistency"  # `build_stage` refuses it
        if table is None:
            assert isinstance(spec.schedule, LogNormalSpec)
            return self.simple(x0, spec.schedule.draw(x0), cond)
        if self.timesteps is not None:
            t, weight = self.timesteps.draw(len(x0))
            bits = likelihood.vlb(self.model, x0, t, table, cond)
            if self.training:
                self.timesteps.observe(gathered(t), gathered(bits.detach()))
            return Losses((weight * bits).mean(), {"bits": (weight * bits).detach().mean()})
        t = torch.randint(len(table), (len(x0),), device=x0.device)
        sigma = table.to(x0)[t]
        if spec.loss == "hybrid":
            eps_mse, bits = likelihood.hybrid(self.model, x0, t, table, cond, rescaled=spec.bound_rescaled)
            weight = sigma**2 * losses.output_weight(spec.predicts, sigma)
            mse, bits = weight * eps_mse, weight.clamp(max=1) * bits
            return Losses((mse + bits).mean(), {"mse": mse.detach().mean(), "bits": bits.detach().mean()})
        return self.simple(x0, sigma, cond)

    def simple(self, x0: Float[Tensor, " b c h w"], sigma: Float[Tensor, " b"], cond: Conditioning) -> Losses:
        """Squared error of what the network predicts."""
        assert self.spec.predicts != "consistency"
        x0_mse = losses.x0_mse(self.model, x0, sigma, cond)
        mse = losses.output_weight(self.spec.predicts, sigma) * x0_mse
        return Losses(mse.mean(), {"mse": mse.detach().mean()})


def parents_of(spec: ChainSpec, parents: Mapping[str, Trained]) -> tuple[Clip | None, Autoencoder | None]:
    """The parent CLIP and the parent autoencoder of a chain.

    Raises:
        ValueError: One is missing, or does not fit the spec.
    """
    for role in spec.needs:
        needed(parents, role, spec.kind)
    clip = None if spec.clip_needs is None else clip_for(spec.kind, spec.clip_needs, parents["clip"])
    if "autoencoder" not in spec.needs:
        return clip, None
    autoencoder = autoencoder_of(parents["autoencoder"])
    fits = [("latent_channels", spec.latent_channels, autoencoder.spec.latent_channels)]
    if isinstance(spec.net, DiTSpec):
        fits.append(("net.image_size", spec.net.image_size, spec.image_size // autoencoder.spec.factor))
    for name, mine, theirs in fits:
        if mine != theirs:
            raise ValueError(f"chain: {name} is {mine}, its parent autoencoder has {theirs}; make them equal")
    return clip, autoencoder
