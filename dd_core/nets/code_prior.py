"""The transformer of the autoregressive prior: a caption, then an image embedding as a sequence of codes.

Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2: coordinates on the main axes of the embeddings,
the largest variance first, each quantised to a bucket; before them the caption, and a token for the product
of caption and image embedding (their nearness).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.embeddings import Pca, decode, encode, from_buckets, to_buckets
from dd_core.nets import text
from dd_core.nets.clip import ReadCaption
from dd_core.nets.places import wave
from dd_core.spec import Spec


class CodePriorSpec(Spec):
    """Size of the transformer, and how an embedding becomes codes."""

    width: int = Field(256, multiple_of=8)
    layers: int = Field(4, ge=1)
    head_width: int = Field(64, ge=8)
    text_width: int = Field(ge=1)
    """Width of the parent CLIP's states."""
    embedding_width: int = Field(ge=1)
    context_length: int = Field(ge=3)
    axes: int = Field(319, ge=1)
    """Codes per embedding, one per main axis; other axes stay at the mean.  Published: 319 of 1024."""
    buckets: int = Field(1024, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> "CodePriorSpec":
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} does not split into heads of {self.head_width}")
        if self.axes > self.embedding_width:
            raise ValueError(f"axes {self.axes} must be at most embedding_width {self.embedding_width}")
        return self


class CodePrior(nn.Module):
    """Continues [caption states, caption embedding, nearness, codes so far] by the next code.

    Attention is causal.  A code enters as sinusoids of its bucket's middle, so that neighbouring buckets
    start with similar inputs.  The axes and their ranges are buffers of the model and ship with it.
    """

    mean: Float[Tensor, " d"]
    main: Float[Tensor, " d k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]
    products: Int[Tensor, " n"]

    def __init__(self, spec: CodePriorSpec) -> None:
        super().__init__()
        self.spec = spec
        width, told = spec.width, spec.context_length + 1
        self.text_in = nn.Linear(spec.text_width, width)
        self.caption_in = nn.Linear(spec.embedding_width, width)
        self.product_in, self.code_in = nn.Linear(256, width), nn.Linear(256, width)
        self.places = nn.Parameter(0.02 * torch.randn(1, told + spec.axes, width))
        heads = width // spec.head_width
        self.blocks = nn.ModuleList(text.TextBlock(width, heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, spec.buckets)
        self.register_buffer("mean", torch.zeros(spec.embedding_width))
        self.register_buffer("main", torch.zeros(spec.embedding_width, spec.axes))
        self.register_buffer("low", torch.zeros(spec.axes))
        self.register_buffer("high", torch.ones(spec.axes))
        self.register_buffer("products", torch.zeros(spec.buckets, dtype=torch.long))
        """Histogram of the nearness of captions and their images, by bucket."""

    def measure(self, pca: Pca, nearness: Float[Tensor, " n"]) -> None:
        """Set axes and buckets from embeddings of the data, once, before anything is learned.

        Args:
            pca: Of image embeddings.
            nearness: Products of captions and their images, in [-1, 1].
        """
        self.mean.copy_(pca.mean)
        self.main.copy_(pca.axes)
        self.low.copy_(pca.low)
        self.high.copy_(torch.maximum(pca.high, pca.low + 1e-6))
        self.products.copy_(self.product_codes(nearness).bincount(minlength=self.spec.buckets))

    def codes(self, embedding: Float[Tensor, " b d"]) -> Int[Tensor, " b k"]:
        """The codes of an image embedding; computed in float32 whatever the dtype of the network."""
        with torch.autocast(embedding.device.type, enabled=False):
            return to_buckets(encode(self.pca(), embedding), self.low, self.high, self.spec.buckets)

    def embedding(self, codes: Int[Tensor, " b k"]) -> Float[Tensor, " b d"]:
        """The image embedding that codes stand for; not normalised."""
        return decode(self.pca(), from_buckets(codes, self.low, self.high, self.spec.buckets))

    def product_codes(self, nearness: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The token for the nearness of caption and image."""
        ends = nearness.new_tensor([-1.0, 1.0])
        return to_buckets(nearness[:, None], ends[:1], ends[1:], self.spec.buckets)[:, 0]

    def pca(self) -> Pca:
        """The axes."""
        return Pca(self.mean, self.main, self.low, self.high)

    def read(self, caption: ReadCaption) -> Float[Tensor, " b m w"]:
        """The caption as the first places of the sequence; computed once per request."""
        return torch.cat([self.text_in(caption.states), self.caption_in(caption.embedding)[:, None]], 1)

    def forward(
        self, told: Float[Tensor, " b m w"], product: Int[Tensor, " b"], codes: Int[Tensor, " b j"]
    ) -> Float[Tensor, " b j_plus_1 n"]:
        """Logits of the first code, and of each that follows one of `codes`.

        Args:
            told: From `read`.
            product: From `product_codes`.
            codes: Those known so far, fewer than `spec.axes`; may be none.
        """
        sequence = torch.cat([self.begin(told, product), self.said(codes)], 1)
        return self.logits(sequence)[:, told.shape[1] :]

    def begin(
        self, told: Float[Tensor, " b m w"], product: Int[Tensor, " b"]
    ) -> Float[Tensor, " b m_plus_1 w"]:
        """The places before the codes: caption and nearness."""
        return torch.cat([told, self.product_in(self.waves(product))[:, None]], 1)

    def said(self, codes: Int[Tensor, " b j"]) -> Float[Tensor, " b j w"]:
        """Codes as places of the sequence."""
        return self.code_in(self.waves(codes.flatten())).view(*codes.shape, self.spec.width)

    def memories(self) -> list[text.Memory]:
        """Empty key-value caches for a new sequence, one per block."""
        return [text.Memory() for _ in self.blocks]

    def logits(
        self, places: Float[Tensor, " b l w"], memories: Sequence[text.Memory] | None = None
    ) -> Float[Tensor, " b l n"]:
        """Logits of the code that follows each of these places.

        Args:
            places: The sequence from its beginning, or what comes after the places in `memories`.
            memories: From `memories`; these places are added to them, so each place is computed once.
        """
        before, length = memories[0].length if memories else 0, places.shape[1]
        x = places + self.places[:, before : before + length]
        mask = torch.ones(1, 1, length, before + length, dtype=torch.bool, device=x.device).tril(before)
        for block, memory in zip(self.blocks, memories or self.memories(), strict=True):
            x = block(x, mask, memory)
        logits: Tensor = self.out(self.norm(x))
        return logits

    def waves(self, codes: Int[Tensor, " n"]) -> Float[Tensor, " n 256"]:
        """Sinusoids of the middle of each bucket."""
        return wave((codes + 0.5) / self.spec.buckets, 256)
