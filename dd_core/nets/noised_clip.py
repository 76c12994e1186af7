"""GLIDE's noised CLIP: an image tower whose class token is the timestep, and its text tower.

Its timesteps are those of the cosine schedule with 1000 steps, so it is told integers, not sigma; our
own tower, which is told sigma, is in `dd_core/stages/noised_clip.py`.

Source: Nichol et al. 2022 (arXiv:2112.10741), section 2.4 and 5.3, and the published model.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.spec import Spec

MEAN = (122.77093945, 116.74601272, 104.09373519)
STD = (68.50053285, 66.63215831, 70.32316309)
"""Of each channel in 0..255: pixels are normalised by these before the image tower, as published."""


class GlideClipSpec(Spec):
    """Size of both towers; the defaults are the published ones."""

    kind: Literal["glide_clip"] = "glide_clip"
    image_size: int = Field(64, ge=8)
    patch_size: int = Field(4, ge=1)
    image_width: int = Field(768, multiple_of=8)
    image_layers: int = Field(12, ge=1)
    timesteps: int = Field(1000, ge=1)
    vocab_size: int = Field(65536, ge=1)
    context_length: int = Field(77, ge=1)
    text_width: int = Field(512, multiple_of=8)
    text_layers: int = Field(12, ge=1)
    head_width: int = Field(64, ge=1)
    embedding_width: int = Field(512, ge=1)
    logit_scale: float = Field(100.0, gt=0)
    """Factor of the cosines before the softmax; not learned, and in no published file."""

    @model_validator(mode="after")
    def _fits(self) -> "GlideClipSpec":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must divide by patch_size {self.patch_size}")
        for name, width in (("image_width", self.image_width), ("text_width", self.text_width)):
            if width % self.head_width:
                raise ValueError(f"{name} {width} must divide by head_width {self.head_width}")
        return self


class ClipBlock(nn.Module):
    """Attention, then a feed-forward network; each pre-norm and residual.  Keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_alone = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.alone_in, self.alone_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, " b l d"], mask: Bool[Tensor, " l l"] | None = None
    ) -> Float[Tensor, " b l d"]:
        h = self.norm_attention(x)
        parts = (layer(h).unflatten(2, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.alone_out(F.gelu(self.alone_in(self.norm_alone(x))))


class ImageTower(nn.Module):
    """Noisy image and timestep -> its embedding, not normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: GlideClipSpec) -> None:
        super().__init__()
        width, side = spec.image_width, spec.image_size // spec.patch_size
        self.timesteps = nn.Embedding(spec.timesteps, width)
        self.patches = nn.Conv2d(3, width, spec.patch_size, stride=spec.patch_size, bias=False)
        self.places = nn.Parameter(width**-0.5 * torch.randn(1 + side**2, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            ClipBlock(width, width // spec.head_width) for _ in range(spec.image_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, spec.embedding_width, bias=False)
        nn.init.normal_(self.timesteps.weight, std=width**-0.5)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Float[Tensor, " b 3 h w"], timestep: Int[Tensor, " b"]) -> Float[Tensor, " b d"]:
        """Embeddings of noisy images at about [-1, 1], scaled as DDPM's x at `timestep`."""
        *_, last = self.states(x, timestep)
        return self.out(self.norm_out(last[:, 0]))

    def features(
        self, x: Float[Tensor, " b 3 h w"], timestep: Int[Tensor, " b"]
    ) -> list[Float[Tensor, " b c rows columns"]]:
        """One map of the patches after each layer."""
        side = x.shape[3] // self.patches.kernel_size[1]
        return [states[:, 1:].float().mT.unflatten(2, (-1, side)) for states in self.states(x, timestep)]

    def states(
        self, x: Float[Tensor, " b 3 h w"], timestep: Int[Tensor, " b"]
    ) -> Iterator[Float[Tensor, " b l d"]]:
        """The output of each layer: the class token, which is the timestep, then the patches."""
        patches = self.patches(((x + 1) * 127.5 - self.mean) / self.std).flatten(2).mT
        sequence = torch.cat([self.timesteps(timestep)[:, None], patches], dim=1) + self.places
        sequence = self.norm_in(sequence)
        for block in self.blocks:
            sequence = block(sequence)
            yield sequence


class TextTower(nn.Module):
    """Tokens -> the embedding of the caption, from its last token, not normalised; attention is causal."""

    def __init__(self, spec: GlideClipSpec) -> None:
        super().__init__()
        width = spec.text_width
        self.tokens = nn.Embedding(spec.vocab_size, width)
        self.places = nn.Parameter(0.01 * torch.randn(spec.context_length, width))
        self.blocks = nn.ModuleList(
            ClipBlock(width, width // spec.head_width) for _ in range(spec.text_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, spec.embedding_width, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, " b l"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " b d"]:
        sequence = self.tokens(tokens) + self.places
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for block in self.blocks:
            sequence = block(sequence, mask)
        last = sequence[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        return self.out(self.norm_out(last))


class GlideClip(nn.Module):
    """Both towers; embeddings have unit length."""

    def __init__(self, spec: GlideClipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.image, self.text = ImageTower(spec), TextTower(spec)

    def embed_image(self, x: Float[Tensor, " b 3 h w"], timestep: Int[Tensor, " b"]) -> Float[Tensor, " b d"]:
        """Noisy images -> unit vectors."""
        return F.normalize(self.image(x, timestep).float(), dim=-1)

    def embed_text(self, tokens: Int[Tensor, " b l"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " b d"]:
        """Captions, each with the number of its tokens, -> unit vectors."""
        return F.normalize(self.text(tokens, lengths).float(), dim=-1)
