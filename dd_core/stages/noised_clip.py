"""The noised CLIP: an image tower that can read noisy images, and so can guide a sampling by a caption.

The tower of CLIP, with an embedding of the noise level added to its class token.  It is trained on noisy
images to find their captions in the space of the parent, whose text tower is frozen: one network fewer to
train, and captions embedded for the parent serve both.

Sources: Nichol et al. 2022 (arXiv:2112.10741, GLIDE), section 3.2 and the published model (class token);
Liu et al. 2021 (arXiv:2112.05744, semantic diffusion guidance), section 3.2 (target "clip").
"""

import math
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_core import images, losses, ranks
from dd_core.nets.clip import MOST_LOG_SCALE, Clip, ClipNetSpec, Convolutions
from dd_core.nets.layers import sinusoids
from dd_core.ranks import gathered
from dd_core.stage import ClipNeeds, EmbeddedBy, Losses, PairBatch, Stage, Trained
from dd_core.stages.clip import clip_for, embedding_of
from dd_core.stages.guide_levels import GuideLevels, GuideSpec
from dd_core.towers import open_clip

LEVEL_WIDTH = 128
"""Sinusoids that describe a noise level."""


class NoisedClipSpec(GuideSpec):
    """Noisy image -> the embedding of what it will become.  It is told log sigma, with a `schedule` too."""

    kind: Literal["noised_clip"] = "noised_clip"
    net: ClipNetSpec = ClipNetSpec()
    """Its image tower; the embeddings must be as wide as the parent's."""
    target: Literal["caption", "clip"] = "caption"
    """What a noisy image has to find in the batch: its caption, or itself without noise."""
    start: Literal["parent", "random"] = "parent"
    """Initial weights: the parent's image tower, which must have the same shape, or random."""

    @property
    def embedded_by(self) -> EmbeddedBy | None:
        """The parent CLIP, if its embeddings of the clean images are the target."""
        wide, side = self.net.embedding_width, self.image_size
        return EmbeddedBy("clip", wide, side) if self.target == "clip" else None

    @property
    def clip_needs(self) -> ClipNeeds:
        """Embeddings of captions or of images, the target; it guides by those of captions."""
        width = {"net.embedding_width": self.net.embedding_width}
        return ClipNeeds(embeddings=width, captions=self.target == "caption")

    @property
    def needs(self) -> tuple[str, ...]:
        """The parent CLIP, whose embeddings of captions or clean images are the target."""
        return ("clip",)

    @property
    def image_size(self) -> int:
        """Side of the prepared images that it trains on."""
        return self.net.image_size

    @property
    def compares(self) -> bool:
        """True: the target has to be found among those of the batch."""
        return True

    @property
    def gathers(self) -> bool:
        """True: among those of every worker."""
        return True


class NoisedClip(nn.Module):
    """An image tower that is told sigma."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ClipNetSpec) -> None:
        super().__init__()
        self.spec = spec
        parts = open_clip().transformer
        self.visual = parts.VisionTransformer(
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            width=spec.image_width,
            layers=spec.image_layers,
            heads=spec.image_width // spec.head_width,
            mlp_ratio=4.0,
            output_dim=spec.embedding_width,
            act_layer=parts.QuickGELU if spec.quick_gelu else nn.GELU,
            norm_layer=parts.LayerNorm,
        )
        if spec.stem == "convolutions":
            self.visual.conv1 = Convolutions(spec)
        width = spec.image_width
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)  # the parent's class token at first
        nn.init.zeros_(last.bias)
        self.level = nn.Sequential(nn.Linear(LEVEL_WIDTH, width), nn.SiLU(), last)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def embed_image(self, x: Float[Tensor, " b 3 h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b d"]:
        """Noisy images -> unit vectors, differentiable in x.

        Args:
            x: x0 + sigma eps with x0 in [-1, 1], at the size of the tower: resizing would change the noise.
            sigma: At least 0; 0 is a clean image.

        Raises:
            ValueError: x has another size.
        """
        states = self.visual.transformer(self.begun(x, sigma))
        features: Tensor = self.visual.ln_post(states[:, 0]) @ self.visual.proj
        return F.normalize(features.float(), dim=-1)

    def features(
        self, x: Float[Tensor, " b 3 h w"], sigma: Float[Tensor, " b"]
    ) -> list[Float[Tensor, " b c rows columns"]]:
        """Noisy images -> one map of the patches after each layer, differentiable in x.

        Raises:
            ValueError: x is not of the size of the tower.
        """
        states, maps = self.begun(x, sigma), []
        for block in self.visual.transformer.resblocks:
            states = block(states)
            maps.append(states[:, 1:].float().mT.unflatten(2, self.visual.grid_size))
        return maps

    def begun(self, x: Float[Tensor, " b 3 h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b l c"]:
        """Input of the first layer: the class token with the noise level added, then the patches."""
        size, visual = self.spec.image_size, self.visual
        if x.shape[2:] != (size, size):
            raise ValueError(
                f"noised_clip reads {size} px and got {tuple(x.shape[2:])}; train it at that size"
            )
        level = sigma[:, None, None, None]
        x = x * torch.rsqrt(1 + level**2)
        patches = visual.conv1(((x + 1) / 2 - self.mean) / self.std).flatten(2).mT
        told = self.level(sinusoids(10 * sigma.clamp(min=1e-3).log(), LEVEL_WIDTH).to(x.dtype))
        tokens = torch.cat([(visual.class_embedding + told)[:, None].to(patches.dtype), patches], dim=1)
        begun: Tensor = visual.ln_pre(tokens + visual.positional_embedding)
        return begun

    def logit_scale(self) -> Float[Tensor, ""]:
        """The factor that turns cosines into logits."""
        return self.log_scale.exp()


class NoisedClipStage(Stage):
    """Trains the tower so that a noisy image is nearest to what it shows.

    Raises:
        ValueError: The parent's embeddings have another width, or its image tower another shape.
    """

    model: NoisedClip

    def __init__(self, spec: NoisedClipSpec, clip: Trained) -> None:
        super().__init__()
        parent = clip_for(spec.kind, spec.clip_needs, clip)
        self.spec = spec
        self.levels = GuideLevels(spec)
        self.model = NoisedClip(spec.net)
        if spec.start == "parent":
            begin_as(self.model, parent)
        self.freeze(parent)

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        x0 = images.to_unit(batch.image)
        sigma = self.levels(x0)
        x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
        image = self.model.embed_image(x, sigma)
        target, pairs = self.target(batch), torch.arange(len(image), device=image.device)[:, None]
        among = losses.Among(gathered(image), gathered(target), ranks.first(len(image)))
        named = batch.tokens if self.spec.target == "caption" else pairs + among.first
        same = losses.same_captions(named, gathered(named))
        loss = ranks.told(losses.info_nce(image, target, self.model.logit_scale(), same, among))
        hit, clear = map(gathered, (losses.found(image, among.text, same), sigma < 1))
        parts = {"retrieval": hit.mean(), "retrieval_clear": hit[clear].sum() / clear.sum().clamp(min=1)}
        return Losses(loss, parts)

    @torch.no_grad()
    def after_step(self) -> None:
        self.model.log_scale.clamp_(max=MOST_LOG_SCALE)

    @torch.no_grad()
    def target(self, batch: PairBatch) -> Tensor:
        """What the images of a batch have to find."""
        clip = self.frozen[0]
        assert isinstance(clip, Clip)
        match self.spec.target:
            case "caption":
                return clip.read(batch.tokens).embedding
            case "clip":
                return embedding_of(clip, batch)
            case _:
                assert_never(self.spec.target)


def begin_as(model: NoisedClip, parent: Clip) -> None:
    """Take over the parent's image tower and scale: at first it embeds clean images as the parent does."""
    fields = (
        "image_size",
        "patch_size",
        "stem",
        "image_width",
        "image_layers",
        "head_width",
        "quick_gelu",
        "mean",
        "std",
    )
    for name in fields:
        mine, theirs = getattr(model.spec, name), getattr(parent.spec, name)
        if mine != theirs:
            raise ValueError(
                f"noised_clip: net.{name} is {mine}, its parent's {theirs}; or set start: random"
            )
    model.visual.load_state_dict(parent.towers.visual.state_dict())
    model.log_scale.data.copy_(parent.towers.logit_scale.data)


def noised_clip_of(trained: Trained) -> NoisedClip:
    """A trained noised CLIP, ready to guide.

    Raises:
        ValueError: It is another stage.
    """
    if not isinstance(trained.spec, NoisedClipSpec):
        raise ValueError(f"the parent 'noised_clip' is a {type(trained.spec).__name__}")
    model = NoisedClip(trained.spec.net)
    model.load_state_dict(trained.weights)
    return model.eval().requires_grad_(False)
