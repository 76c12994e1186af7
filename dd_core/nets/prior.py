"""The networks of the diffusion prior: caption and a noised image embedding -> the image embedding.

`PriorNet` is ours: a transformer reads the caption once, a small network denoises one vector many times.
`CausalPrior` is the published one, a causal transformer whose sequence includes the noised embedding; it
exists so that published weights can be used.

Sources: Ramesh et al. 2022 (arXiv:2204.06125, section 2.2, diffusion prior); Li et al. 2024
(arXiv:2406.11838, section 3.2: a denoiser of vectors, told one vector by a transformer).
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.denoiser import Conditioning
from dd_core.nets import dit, text
from dd_core.nets.clip import PackedCaption
from dd_core.nets.layers import sinusoids, unrounded
from dd_core.nets.packed import Packing, packing
from dd_core.nets.places import wave
from dd_core.nets.whitening import Whitening
from dd_core.spec import Spec

QUERIES = 4
"""Learned queries in the caption's sequence, whose outputs the denoiser is told."""


class PriorNetSpec(Spec):
    """Size of the reader and of the denoiser."""

    width: int = Field(256, ge=8, multiple_of=8)
    layers: int = Field(4, ge=1)
    head_width: int = Field(64, ge=8)
    text_width: int = Field(ge=1)
    """Width of the parent CLIP's states."""
    embedding_width: int = Field(ge=1)
    context_length: int = Field(ge=3)
    denoiser_width: int = Field(512, ge=8, multiple_of=8)
    denoiser_blocks: int = Field(4, ge=1)
    measured_images: int = Field(2_048, ge=2)
    """Images whose embeddings the whitening is fitted to, before the first step that learns."""

    @model_validator(mode="after")
    def _fits(self) -> "PriorNetSpec":
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} must divide by head_width {self.head_width}")
        return self


class DenoiserBlock(nn.Module):
    """A two-layer network on a vector, scaled, shifted and gated by what it is told."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = dit.Modulation(width, width, 3)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, " b w"], told: Float[Tensor, " b w"]) -> Float[Tensor, " b w"]:
        shift, scale, gate = (part[:, 0] for part in self.modulation(told))
        return x + (1 + gate) * self.leave(F.silu(self.enter(self.norm(x) * (1 + scale) + shift)))


class ReaderBlock(nn.Module):
    """A plain pre-norm transformer block over captions of unequal length."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, " n w"], packed: Packing) -> Float[Tensor, " n w"]:
        seen = packed.attended(self.qkv(self.norms[0](x)), self.heads, packed.there[:, None, None])
        x = x + self.out(seen)
        return x + self.mlp(self.norms[1](x))


class PriorNet(nn.Module):
    """Reads [caption embedding, queries, caption states] once; then denoises, told the queries' outputs.

    The published prior runs its transformer at every noise level.  Here, at the demo's size, a noise level
    costs a fifth of reading the caption, so that training can draw several for each caption.
    """

    HIDDEN: ClassVar = ("text_in", "caption_in", "found", "sigma_in.2", "noised_in")
    """Layers that muon_named steps by Muon (dd_core/optimizers.py)."""

    def __init__(self, spec: PriorNetSpec) -> None:
        super().__init__()
        self.whitening = Whitening(spec.embedding_width, spec.measured_images)
        self.loud = spec.embedding_width**0.5
        self.text_in = nn.Linear(spec.text_width, spec.width)
        self.caption_in = nn.Linear(spec.embedding_width, spec.width)
        self.query = nn.Parameter(0.5 * torch.randn(1, QUERIES, spec.width))
        self.places = nn.Parameter(0.5 * torch.randn(1, spec.context_length, spec.width))
        heads, hidden = spec.width // spec.head_width, spec.denoiser_width
        self.text_blocks = nn.ModuleList(ReaderBlock(spec.width, heads) for _ in range(spec.layers))
        self.text_norm = nn.LayerNorm(spec.width)
        self.found = nn.Linear(QUERIES * spec.width, hidden)
        self.sigma_in = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.noised_in = nn.Linear(spec.embedding_width, hidden)
        self.blocks = nn.ModuleList(DenoiserBlock(hidden) for _ in range(spec.denoiser_blocks))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(2 * hidden, spec.embedding_width)

    def read(self, caption: PackedCaption) -> Float[Tensor, " b 1 w"]:
        """The caption as the one vector that the denoiser is told, at whatever noise level."""
        rows, length = caption.packing.there.shape
        whole = self.caption_in(caption.embedding * self.loud)[:, None]
        asked = torch.cat([whole, self.query.expand(rows, -1, -1)], 1)
        states = self.text_in(caption.states) + caption.packing.pack(
            self.places[:, :length].expand(rows, -1, -1)
        )
        found = packing(F.pad(caption.packing.there, (1 + QUERIES, 0), value=True))
        x = found.pack(torch.cat([asked, caption.packing.unpack(states)], 1))
        for block in self.text_blocks:
            x = block(x, found)
        queries = self.text_norm(found.unpack(x)[:, 1 : 1 + QUERIES])
        return self.found(queries.flatten(1))[:, None]

    def forward(
        self, x: Float[Tensor, " b d"], log_sigma: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b d"]:
        if cond.text is None:
            raise ValueError("the prior is told a caption, but Conditioning.text is None")
        told = F.silu(unrounded(self.sigma_in, wave(log_sigma / 4, 256)) + cond.text[:, 0])
        h = self.noised_in(x)
        for block in self.blocks:
            h = block(h, told)
        return unrounded(self.out, torch.cat([self.norm(h), told], -1))


class CausalPriorSpec(Spec):
    """Size of the published prior; the defaults are Karlo's (1022 M parameters)."""

    kind: Literal["causal_prior"] = "causal_prior"
    width: int = Field(2048, multiple_of=8)
    layers: int = Field(20, ge=1)
    heads: int = Field(32, ge=1)
    context_length: int = Field(77, ge=1)
    embedding_width: int = Field(768, ge=1)
    """Of CLIP's embeddings and of its states, which are as wide (ViT-L/14)."""
    level_scale: float = Field(1.0, gt=0)
    """Factor of the noise level; 1 if told timesteps, see `UNetSpec.level_scale`."""

    @model_validator(mode="after")
    def _fits(self) -> "CausalPriorSpec":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads")
        return self


class CausalPrior(nn.Module):
    """Continues [caption states, caption embedding, noise level, noised embedding] by the image embedding.

    Attention is causal, and padding is masked.  Embeddings enter and leave whitened: (value - mean) /
    deviation for each coordinate, with the statistics published beside the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: CausalPriorSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.level_in, self.level_out = nn.Linear(width, width), nn.Linear(width, width)
        self.text_in = nn.Linear(spec.embedding_width, width)
        self.caption_in = nn.Linear(spec.embedding_width, width)
        self.noised_in = nn.Linear(spec.embedding_width, width)
        self.query = nn.Parameter(0.01 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.01 * torch.randn(1, spec.context_length + 4, width))
        self.blocks = nn.ModuleList(text.TextBlock(width, spec.heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, spec.embedding_width)
        self.register_buffer("mean", torch.zeros(spec.embedding_width))
        self.register_buffer("std", torch.ones(spec.embedding_width))

    def read(
        self,
        states: Float[Tensor, " b l d"],
        caption: Float[Tensor, " b d"],
        heard: Bool[Tensor, " b l"] | None = None,
    ) -> Conditioning:
        """The caption as the first places of the sequence; computed once per request."""
        told = torch.cat([self.text_in(states), self.caption_in(caption)[:, None]], dim=1)
        return Conditioning(text=told, heard=None if heard is None else F.pad(heard, (0, 1), value=True))

    def forward(
        self, x: Float[Tensor, " b d"], log_sigma: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b d"]:
        if cond.text is None:
            raise ValueError("the prior is told a caption, but Conditioning.text is None")
        waves = sinusoids(self.spec.level_scale * log_sigma, self.spec.width)
        level = unrounded(self.level_out, F.silu(unrounded(self.level_in, waves)))[:, None]
        query = self.query.expand(len(x), -1, -1)
        sequence = torch.cat([cond.text, level, self.noised_in(x)[:, None], query], dim=1) + self.places
        length = sequence.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device).tril()
        if cond.heard is not None:
            mask = mask & F.pad(cond.heard, (0, 3), value=True)[:, None, None]
        for block in self.blocks:
            sequence = block(sequence, mask)
        return unrounded(self.out, self.norm(sequence[:, -1]))

    def whitened(self, embedding: Float[Tensor, " b d"]) -> Float[Tensor, " b d"]:
        """An image embedding of CLIP, whitened for the prior."""
        return (embedding - self.mean) / self.std

    def coloured(self, x0: Float[Tensor, " b d"]) -> Float[Tensor, " b d"]:
        """The image embedding of CLIP from a whitened one."""
        return x0 * self.std + self.mean
