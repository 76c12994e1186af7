"""CLIP: one embedding space for images and captions, by open_clip's models behind our interface.

Images come in [-1, 1] at any square size and are resized to the image tower's size; captions come as
tokens of open_clip's tokenizer.  Embeddings have unit length.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dd_core.devices import kind_of
from dd_core.nets.packed import Packing, packing, upto_end
from dd_core.nets.places import grid_waves
from dd_core.spec import Spec
from dd_core.towers import open_clip

MOST_LOG_SCALE = math.log(100)
"""Training keeps the logarithm of what cosines are multiplied by at this or below, as published (CLIP)."""


class ClipNetSpec(Spec):
    """Size of the two towers."""

    towers: Literal["both", "text"] = "both"
    """text: the text tower alone, as in files of Stable Diffusion: it gives states but no embedding.  The
    fields of the image tower mean nothing then."""

    embedding_width: int = Field(512, ge=1)
    image_size: int = Field(224, ge=8)
    patch_size: int = Field(16, ge=1)
    stem: Literal["patch", "convolutions"] = "patch"
    """How a patch becomes a token: by one matrix, as published, or by convolutions that halve the image until
    a pixel is a patch; with these it sees edges from the first hundred steps on."""
    image_width: int = Field(768, multiple_of=8)
    image_layers: int = Field(12, ge=1)
    context_length: int = Field(77, ge=3)
    text_width: int = Field(512, multiple_of=8)
    text_layers: int = Field(12, ge=1)
    head_width: int = Field(64, ge=8)
    text_heads: int = Field(0, ge=0)
    """Heads of the text tower; 0: as many as `head_width` makes.  ViT-H has wider heads for images only."""
    vocab_size: int = 49408
    quick_gelu: bool = False
    """The activation of OpenAI's own weights."""
    states: Literal["last", "penultimate"] = "last"
    """Layer of the text tower whose output, after the final norm, is a caption's states; penultimate: Stable
    Diffusion 2.  The embedding always comes from the last layer."""
    pads_with: Literal["zero", "end"] = "zero"
    """The padding after END, whose states matter to a network without a mask: token 0 (CLIP), or END again
    (Stable Diffusion 1)."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Of each channel in [0, 1], subtracted before the image tower."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _halves(self) -> "ClipNetSpec":
        if self.stem == "convolutions" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(
                f"stem convolutions halves the image, patch_size {self.patch_size} is no power of 2"
            )
        return self


class PackedCaption(NamedTuple):
    """The text tower's output for captions, without padding."""

    states: Float[Tensor, " n w"]
    """One per place of the packing, after the final norm."""
    embedding: Float[Tensor, " b d"]
    """Unit vectors."""
    packing: Packing
    """Of the tokens up to END; rows are cut after the longest caption, rounded up to a multiple of 8."""


class ReadCaption(NamedTuple):
    """The text tower's output for captions."""

    states: Float[Tensor, " b l w"]
    """One per token, after the final norm; see `ClipNetSpec.states`."""
    embedding: Float[Tensor, " b d"]
    """Unit vectors; of width 0 if there is only the text tower."""


def quick_attention(like: Tensor) -> AbstractContextManager[None]:
    """On a CPU explicit matrix products: they train a quarter faster there than the fused kernel (bf16)."""
    return sdpa_kernel(SDPBackend.MATH) if kind_of(like) == "cpu" else nullcontext()


class Convolutions(nn.Sequential):
    """Image -> a token per patch, by convolutions of stride 2, each twice as wide as the one before.

    Source: Xiao et al. 2021 (arXiv:2106.14881, "Early convolutions help transformers see better"), with
    GroupNorm, since batches of CLIP are many and small here.
    """

    def __init__(self, spec: ClipNetSpec) -> None:
        halvings = int(math.log2(spec.patch_size))
        layers: list[nn.Module] = []
        channels = 3
        for left in reversed(range(halvings)):
            wider = max(8, 2 * spec.image_width // 3 // 2**left // 8 * 8)
            layers += [
                nn.Conv2d(channels, wider, 3, 2, 1),
                nn.GroupNorm(max(4, wider // 16), wider),
                nn.SiLU(),
            ]
            channels = wider
        width = spec.image_width
        super().__init__(*layers, nn.Conv2d(channels, width, 1), nn.GroupNorm(1, width))
        kernels = [name for name, layer in self.named_children() if isinstance(layer, nn.Conv2d)]
        self.HIDDEN = tuple(kernels[1:])
        """Layers that muon_named steps by Muon: all convolutions but the one that sees pixels."""


def vision_of(spec: ClipNetSpec) -> Any:
    """open_clip's config of the image tower; for "text" the smallest that it builds, which `Clip` deletes."""
    if spec.towers == "text":
        return open_clip().model.CLIPVisionCfg(layers=1, width=8, head_width=8, patch_size=8, image_size=8)
    return open_clip().model.CLIPVisionCfg(
        layers=spec.image_layers,
        width=spec.image_width,
        head_width=spec.head_width,
        patch_size=spec.patch_size,
        image_size=spec.image_size,
    )


class Clip(nn.Module):
    """An image tower and a text tower.  Source: Radford et al. 2021 (arXiv:2103.00020), section 2."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ClipNetSpec) -> None:
        super().__init__()
        self.spec = spec
        model = open_clip().model
        vision = vision_of(spec)
        text = model.CLIPTextCfg(
            context_length=spec.context_length,
            vocab_size=spec.vocab_size,
            width=spec.text_width,
            heads=spec.text_heads or spec.text_width // spec.head_width,
            layers=spec.text_layers,
        )
        self.towers = model.CLIP(spec.embedding_width, vision, text, quick_gelu=spec.quick_gelu)
        if spec.towers == "text":
            del self.towers.visual, self.towers.logit_scale
            self.towers.text_projection = None
        elif spec.stem == "convolutions":
            self.towers.visual.conv1 = Convolutions(spec)
        self.begin_places()
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def begin_places(self) -> None:
        """Start position and token embeddings at the amplitude of patches; open_clip's start far smaller."""
        spec = self.spec
        if spec.towers == "both":
            waves = grid_waves(spec.image_size // spec.patch_size, spec.image_width)
            self.towers.visual.positional_embedding[1:] = waves
        nn.init.normal_(self.towers.positional_embedding, std=0.5)
        nn.init.normal_(self.towers.token_embedding.weight, std=0.5)

    def embed_image(self, image: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b d"]:
        """Images in [-1, 1] -> unit vectors."""
        size = self.spec.image_size
        if image.shape[-1] != size:
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
        with quick_attention(image):
            features: Tensor = self.towers.encode_image(((image + 1) / 2 - self.mean) / self.std)
        return F.normalize(features.float(), dim=-1)

    def read(self, tokens: Int[Tensor, " b l"]) -> ReadCaption:
        """Captions -> a state per token and a unit vector for the whole."""
        towers, end = self.towers, tokens.argmax(-1)
        if self.spec.pads_with == "end":
            tokens = torch.where(upto_end(tokens), tokens, tokens.amax(1, keepdim=True))
        x = before = towers.token_embedding(tokens) + towers.positional_embedding
        with quick_attention(tokens):
            for block in towers.transformer.resblocks:
                before, x = x, block(x, attn_mask=towers.attn_mask)
        last = towers.ln_final(x)
        states = last if self.spec.states == "last" else towers.ln_final(before)
        if self.spec.towers == "text":
            return ReadCaption(states, last.new_zeros(len(tokens), 0, dtype=torch.float32))
        ends = last[torch.arange(len(tokens), device=tokens.device), end]
        return ReadCaption(states, F.normalize((ends @ towers.text_projection).float(), dim=-1))

    def read_packed(self, tokens: Int[Tensor, " b l"]) -> PackedCaption:
        """The same states and embeddings as `read`, in half the time: nothing after END is computed."""
        towers, there = self.towers, upto_end(tokens)
        longest = min(-(-len(there.any(0).nonzero()) // 8) * 8, tokens.shape[1])  # few sizes: see packed.py
        tokens, found = tokens[:, :longest], packing(there[:, :longest])
        earlier = torch.ones(longest, longest, dtype=torch.bool, device=tokens.device).tril()
        x = before = found.pack(towers.token_embedding(tokens) + towers.positional_embedding[:longest])
        for block in towers.transformer.resblocks:
            before = x
            parts = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
            seen = found.attended(parts, block.attn.num_heads, earlier[None, None])
            x = x + block.ls_1(block.attn.out_proj(seen))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        last = towers.ln_final(x)
        states = last if self.spec.states == "last" else towers.ln_final(before)
        ends = last[found.there.sum(1).cumsum(0) - 1]
        return PackedCaption(states, F.normalize((ends @ towers.text_projection).float(), dim=-1), found)

    def logit_scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by before the softmax."""
        return self.towers.logit_scale.exp()
