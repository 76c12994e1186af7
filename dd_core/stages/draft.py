"""The draft: a CLIP image embedding decoded to a small image in one call, for the base to start from."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dd_core import images, losses
from dd_core.nets.clip import Clip
from dd_core.nets.draft import Draft
from dd_core.nets.whitening import nothing_of
from dd_core.stage import ClipNeeds, EmbeddedBy, LearnedSpec, Losses, PairBatch, Stage, Trained
from dd_core.stages.clip import clip_for, embedding_of


class DraftSpec(LearnedSpec):
    """Embedding of the parent CLIP -> image_size x image_size RGB, by regression."""

    kind: Literal["draft"] = "draft"
    embedding_width: int = Field(512, ge=1)
    """Of the parent CLIP."""
    width: int = Field(128, ge=8, multiple_of=8)
    """Channels at an eighth of the side."""
    layers: int = Field(6, ge=1)
    """Flat layers of which an image is blended."""
    image_size: int = Field(64, ge=8, multiple_of=8)
    embedded_at: int | None = Field(None, ge=8)
    """Side of the prepared images whose embeddings it is told, the same as its prior's; None: image_size."""
    edge_weight: float = Field(4.0, ge=0)
    """Of the squared error of differences between neighbouring pixels, which carry the shapes;
    Mathieu et al. 2016 (arXiv:1511.05440, equation 6)."""
    embedding_noise: float = Field(0.05, ge=0)
    """Standard deviation of the noise on each whitened coordinate, since the prior's draw is not exact."""
    measured_images: int = Field(2_048, ge=2)
    """Images whose embeddings are looked at before the first step that learns, to whiten them."""

    @property
    def embedded_by(self) -> EmbeddedBy:
        """The parent CLIP."""
        return EmbeddedBy("clip", self.embedding_width, self.embedded_at or self.image_size)

    @property
    def clip_needs(self) -> ClipNeeds:
        """Embeddings of images."""
        return ClipNeeds(embeddings={"embedding_width": self.embedding_width})

    @property
    def looks_at(self) -> int:
        """Images measured for the whitening."""
        return self.measured_images


class DraftStage(Stage):
    """Trains the decoder on the embeddings of the images themselves.

    Raises:
        ValueError: The parent's embeddings have another width.
    """

    model: Draft

    def __init__(self, spec: DraftSpec, clip: Trained) -> None:
        super().__init__()
        self.spec = spec
        self.model = draft_net(spec)
        self.freeze(clip_for(spec.kind, spec.clip_needs, clip))

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        clip = self.frozen[0]
        assert isinstance(clip, Clip)
        x0 = images.to_unit(batch.image)
        embedding = embedding_of(clip, batch, self.spec.embedded_at)
        if not self.model.whitening.ready:
            self.model.whitening.look(embedding)
            return Losses(nothing_of(self.model), {})
        told = self.model.whitening(embedding)
        made = self.model.unfolded(told + self.spec.embedding_noise * torch.randn_like(told)).float()
        mse = F.mse_loss(made, x0)
        edges = losses.edge_mse(made, x0)
        return Losses(mse + self.spec.edge_weight * edges, {"x0_mse": mse.detach()})


def draft_net(spec: DraftSpec) -> Draft:
    """The decoder of a spec, untrained."""
    return Draft(spec.embedding_width, spec.image_size, spec.width, spec.layers, spec.measured_images)


def draft_of(trained: Trained) -> Draft:
    """A trained decoder, ready to use.

    Raises:
        ValueError: The parent is not a draft.
    """
    if not isinstance(trained.spec, DraftSpec):
        raise ValueError(f"the parent 'draft' is a {type(trained.spec).__name__}, it must be a draft")
    net = draft_net(trained.spec)
    net.load_state_dict(trained.weights)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def drawn(net: Draft, embedding: Tensor) -> Tensor:
    """[b, d] embeddings as [b, 3, h, w] images in [-1, 1]; zeros, which mean no embedding, as plain gray."""
    there = embedding.any(-1)[:, None, None, None]
    return torch.where(there, net(embedding).float().clamp(-1, 1), 0.0)
