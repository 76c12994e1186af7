"""The chain: a network trained on discrete timesteps, as DDPM and all that came of it before sigma.

One stage for DDPM, Improved DDPM, GLIDE, ADM, the decoder of unCLIP and latent diffusion, which differ in
what is written in the spec alone: the schedule, the loss, the network, what it is told (a caption by a
transformer of its own or by the parent CLIP, a class, an image embedding, a smaller picture, a picture with
a hole), and whether x is a picture or a latent.

Sources: Ho et al. 2020 (arXiv:2006.11239), Nichol & Dhariwal 2021 (arXiv:2102.09672), Dhariwal & Nichol 2021
(arXiv:2105.05233), Nichol et al. 2022 (arXiv:2112.10741), Ramesh et al. 2022 (arXiv:2204.06125), Rombach et
al. 2022 (arXiv:2112.10752).  Continuous noise levels are trained by `base`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_core import images, likelihood, losses, schedules
from dd_core.denoiser import Conditioning, NetworkDenoiser
from dd_core.nets.autoencoder import Autoencoder
from dd_core.nets.clip import Clip
from dd_core.nets.dit import DiTSpec
from dd_core.nets.text import UnclipSpec
from dd_core.ranks import gathered
from dd_core.stage import Losses, PairBatch, Stage, Trained
from dd_core.stages.autoencoder import autoencoder_of
from dd_core.stages.chain_spec import ChainSpec, denoiser_of
from dd_core.stages.chain_told import encoded, heard_of, holes, kept, seen, smaller, told
from dd_core.stages.clip import clip_of
from dd_core.stages.network import NetworkSpec
from dd_core.stages.upsampler import crops


class ChainStage(Stage):
    """Trains a network on the timesteps of a chain.

    Args:
        spec: What to train.
        parents: "clip" and "autoencoder" where the spec needs them; "start", if it is there, gives the first
            weights: a chain, or a published network, that was told no more of the picture (the weights of
            what is new are zero at first).

    Raises:
        ValueError: A parent is missing, or does not fit.
    """

    model: NetworkDenoiser[nn.Module]
    table: Float[Tensor, " t"]
    """Noise levels of the timesteps."""

    def __init__(self, spec: ChainSpec, parents: Mapping[str, Trained]) -> None:
        super().__init__()
        self.spec = spec
        clip, autoencoder = parents_of(spec, parents)
        self.model = denoiser_of(spec)
        if "start" in parents:
            self.model.load_state_dict(widened(parents["start"], self.model.state_dict()))
        self.register_buffer("table", schedules.sigmas(spec.schedule), persistent=False)
        self.timesteps: likelihood.TimestepSampler | None = None
        if spec.loss == "vlb":
            self.timesteps = likelihood.TimestepSampler(spec.schedule.num_timesteps)
        self.freeze(*(part for part in (clip, autoencoder) if part is not None))

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        """Raises ValueError if the network is told classes and a picture has none."""
        spec, picture = self.spec, images.to_unit(batch.image)
        clip = next((part for part in self.frozen if isinstance(part, Clip)), None)
        autoencoder = next((part for part in self.frozen if isinstance(part, Autoencoder)), None)
        heard_whole = heard_of(spec, batch, picture, clip)
        if spec.crop:
            picture = crops(picture, spec.crop, spec.factor)
        x0 = encoded(picture, autoencoder, noisy=True)
        heard = kept(spec, heard_whole)
        hole = holes(picture) if spec.inpaints else None
        shown = seen(spec, autoencoder, small=smaller(spec, picture), known=picture, hole=hole)
        return self.loss(x0, told(spec, self.model.network, clip, heard, shown))

    def loss(self, x0: Float[Tensor, " b c h w"], cond: Conditioning) -> Losses:
        """The loss that the spec names, at random timesteps."""
        count, spec = len(x0), self.spec
        if self.timesteps is not None:
            t, weight = self.timesteps.draw(count)
            bits = likelihood.vlb(self.model, x0, t, self.table, cond)
            if self.training:
                self.timesteps.observe(gathered(t), gathered(bits.detach()))
            return Losses((weight * bits).mean(), {"bits": (weight * bits).detach().mean()})
        t = torch.randint(len(self.table), (count,), device=x0.device)
        sigma = self.table.to(x0)[t]
        if spec.loss == "hybrid":
            eps_mse, bits = likelihood.hybrid(
                self.model, x0, t, self.table, cond, rescaled=spec.bound_rescaled
            )
            mse = eps_mse * sigma**2 * losses.output_weight(spec.predicts, sigma)
            return Losses((mse + bits).mean(), {"mse": mse.detach().mean(), "bits": bits.detach().mean()})
        x0_mse = losses.x0_mse(self.model, x0, sigma, cond)
        mse = losses.output_weight(spec.predicts, sigma) * x0_mse
        return Losses(mse.mean(), {"mse": mse.detach().mean()})


def parents_of(spec: ChainSpec, parents: Mapping[str, Trained]) -> tuple[Clip | None, Autoencoder | None]:
    """The CLIP and the autoencoder that a chain stands on.

    Raises:
        ValueError: One is missing, or of another width than the spec says.
    """
    for role in spec.needs:
        if role not in parents:
            raise ValueError(f"chain: needs the parent {role!r}; train it first and name it in parents")
    clip = clip_of(parents["clip"]) if "clip" in spec.needs else None
    autoencoder = autoencoder_of(parents["autoencoder"]) if "autoencoder" in spec.needs else None
    for name, mine, theirs in fits(spec, clip, autoencoder):
        if mine != theirs:
            raise ValueError(f"chain: {name} is {mine}, its parent has {theirs}; make them equal")
    return clip, autoencoder


def fits(spec: ChainSpec, clip: Clip | None, autoencoder: Autoencoder | None) -> list[tuple[str, int, int]]:
    """What spec and parents must agree on: name, as the spec has it, as the parent has it."""
    found = []
    if clip is not None and spec.embedding_width:
        found.append(("embedding_width", spec.embedding_width, clip.spec.embedding_width))
    if clip is not None and spec.text_width:
        width = spec.net.states_width if isinstance(spec.net, UnclipSpec) else spec.text_width
        found.append(("width of the caption's states", width, clip.spec.text_width))
    if autoencoder is not None:
        found.append(("latent_channels", spec.latent_channels, autoencoder.spec.latent_channels))
        if isinstance(spec.net, DiTSpec):
            found.append(("net.image_size", spec.net.image_size, spec.image_size // autoencoder.spec.factor))
    return found


def widened(start: Trained, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """First weights from another model; input channels that it lacked are zero: it answers as before.

    Raises:
        ValueError: A weight is missing, or differs in more than input channels.
    """
    published = isinstance(start.spec, NetworkSpec)
    weights = {f"network.{name}" if published else name: value for name, value in start.weights.items()}
    if odd := sorted(weights.keys() ^ now.keys()):
        raise ValueError(f"chain: the parent 'start' has another network: {odd[0]} is in one of them only")
    return {name: wider(name, weights[name], value) for name, value in now.items()}


def wider(name: str, weight: Tensor, like: Tensor) -> Tensor:
    """A weight with zeros for the input channels that it lacks."""
    missing = like.shape[1] - weight.shape[1] if like.ndim == 4 == weight.ndim else 0
    if weight.shape != like.shape and (
        missing < 0 or weight.shape[0] != like.shape[0] or weight.shape[2:] != like.shape[2:]
    ):
        raise ValueError(
            f"chain: {name} of the parent 'start' is {tuple(weight.shape)}, here {tuple(like.shape)}; "
            "only input channels may be added"
        )
    return F.pad(weight, (0, 0, 0, 0, 0, missing)) if missing else weight
