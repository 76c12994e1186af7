"""Caption encoders trained jointly with their UNet: a text transformer, or projections of CLIP's states.

`read` computes what depends on neither x nor sigma, once per request, as a `Conditioning`.

Sources: Nichol et al. 2022 (arXiv:2112.10741), section 2.3 and the published model (padding); Ramesh et
al. 2022 (arXiv:2204.06125), section 2.1, as in the published unCLIP weights (CLIP's states, no layers).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.denoiser import Conditioning
from dd_core.nets.attention import attend
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.spec import Spec

AMPLITUDE = 0.5
"""Of tokens and places at the start: what a block adds is about as large, and would drown smaller ones."""


class TextSpec(Spec):
    """Size of a text transformer; the defaults are GLIDE's published one."""

    width: int = Field(512, multiple_of=8)
    layers: int = Field(16, ge=1)
    heads: int = Field(8, ge=1)
    context_length: int = Field(128, ge=1)
    vocab_size: int = Field(50257, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "TextSpec":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads")
        return self


class Memory:
    """Key-value cache of one block: keys and values of the places read so far."""

    def __init__(self) -> None:
        self.parts: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Places read so far."""
        return 0 if self.parts is None else self.parts[0].shape[2]

    def joined(
        self, key: Float[Tensor, " b h l w"], value: Float[Tensor, " b h l w"]
    ) -> tuple[Float[Tensor, " b h m w"], Float[Tensor, " b h m w"]]:
        """Keys and values of all places; the new ones are appended to the cache."""
        if self.parts is not None:
            key, value = (torch.cat([old, new], 2) for old, new in zip(self.parts, (key, value), strict=True))
        self.parts = (key, value)
        return self.parts


class TextBlock(nn.Module):
    """Attention, then a feed-forward network; both pre-norm, residual.  Rows of `qkv`: query, key, value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_alone = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.alone_in, self.alone_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self,
        x: Float[Tensor, " b l d"],
        mask: Bool[Tensor, " #b 1 l m"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, " b l d"]:
        """The output for the sequence; each place attends where its row of `mask` is True.

        Args:
            x: The sequence, or what comes after the places in `memory`.
            mask: Over the places in memory, then those of x; None: all True.
            memory: Cache of the places before; those of x are appended to it.
        """
        parts = self.qkv(self.norm_attention(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if memory is not None:
            key, value = memory.joined(key, value)
        seen = attend(query, key, value, mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.alone_out(F.gelu(self.alone_in(self.norm_alone(x))))


class TextTransformer(nn.Module):
    """Tokens -> states.  Every token attends to all, including padding, which has learned vectors of its own.

    A token where `heard` is False is replaced by the padding vector of its place, whatever its value.
    """

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.width)
        self.places = nn.Parameter(AMPLITUDE * torch.randn(spec.context_length, spec.width))
        self.padding = nn.Parameter(AMPLITUDE * torch.randn(spec.context_length, spec.width))
        self.blocks = nn.ModuleList(TextBlock(spec.width, spec.heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)
        nn.init.normal_(self.tokens.weight, std=AMPLITUDE)

    def forward(self, tokens: Int[Tensor, " b l"], heard: Bool[Tensor, " b l"]) -> Float[Tensor, " b l d"]:
        x = torch.where(heard[:, :, None], self.tokens(tokens) + self.places, self.padding)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class CaptionedSpec(Spec):
    """A UNet and its own text transformer, as in GLIDE."""

    kind: Literal["captioned"] = "captioned"
    unet: UNetSpec
    text: TextSpec = TextSpec()
    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(6, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "CaptionedSpec":
        if self.unet.text_width != self.text.width:
            raise ValueError(f"unet.text_width is {self.unet.text_width}, text.width is {self.text.width}")
        return self


class CaptionedUNet(nn.Module):
    """GLIDE: every attention reads the caption's states; the last state is also added to the noise level."""

    def __init__(self, spec: CaptionedSpec) -> None:
        super().__init__()
        self.spec = spec
        self.unet = UNet(spec.unet, in_channels=spec.in_channels, out_channels=spec.out_channels)
        self.text = TextTransformer(spec.text)

    def read(self, tokens: Int[Tensor, " b l"], heard: Bool[Tensor, " b l"]) -> Conditioning:
        """The caption as the UNet is told it; padding has states of its own, so no token is masked there."""
        return self.unet.prepared(Conditioning(text=self.text(tokens, heard)))

    def forward(
        self, x: Float[Tensor, " b c h w"], log_sigma: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b o h w"]:
        return self.unet(x, log_sigma, cond)


class UnclipSpec(Spec):
    """A UNet told an image embedding, and the frozen CLIP's states and embedding of the caption."""

    kind: Literal["unclip"] = "unclip"
    unet: UNetSpec
    states_width: int = Field(768, ge=1)
    """Width of CLIP's states; its embeddings, of caption and image, have width unet.embedding_width."""
    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(6, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "UnclipSpec":
        if not self.unet.embedding_width:
            raise ValueError("unet.embedding_width is 0; set it to the width of CLIP's embeddings")
        if not (self.unet.text_width and self.unet.level_told) or self.unet.text_at_level:
            raise ValueError(
                "unet must be told states and the caption apart: text_width, level_told=true, "
                "text_at_level=false"
            )
        return self


class UnclipUNet(nn.Module):
    """The decoder of unCLIP as published: projected states of CLIP, projected caption, image embedding."""

    def __init__(self, spec: UnclipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.unet = UNet(spec.unet, in_channels=spec.in_channels, out_channels=spec.out_channels)
        self.states = nn.Linear(spec.states_width, spec.unet.text_width)
        self.norm = nn.LayerNorm(spec.unet.text_width)
        self.caption = nn.Linear(spec.unet.embedding_width, 4 * spec.unet.width)
        self.no_embedding = nn.Parameter(torch.zeros(spec.unet.embedding_width))
        """Stands for an absent image embedding in classifier-free guidance."""

    def read(
        self,
        states: Float[Tensor, " b l d"],
        caption: Float[Tensor, " b d"],
        heard: Bool[Tensor, " b l"],
        image_embedding: Float[Tensor, " b d"] | None,
    ) -> Conditioning:
        """CLIP's states and embeddings as the UNet is told them; without image_embedding `no_embedding`."""
        if image_embedding is None:
            image_embedding = self.no_embedding.expand(len(states), -1)
        text, level = self.norm(self.states(states)), self.caption(caption)
        cond = Conditioning(text=text, image_embedding=image_embedding, level=level, heard=heard)
        return self.unet.prepared(cond)

    def forward(
        self, x: Float[Tensor, " b c h w"], log_sigma: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b o h w"]:
        return self.unet(x, log_sigma, cond)
