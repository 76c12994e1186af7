"""The transformer of the diffusion prior: caption and a noised image embedding -> the image embedding."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dd_core.denoiser import Conditioning
from dd_core.nets.clip import ReadCaption
from dd_core.nets.places import TextBlock, wave
from dd_core.spec import Spec


class PriorNetSpec(Spec):
    """Size of the prior's transformer."""

    width: int = Field(256, multiple_of=8)
    layers: int = Field(4, ge=1)
    head_width: int = Field(64, ge=8)
    text_width: int = Field(ge=1)
    """Of the states of the parent CLIP."""
    embedding_width: int = Field(ge=1)
    context_length: int = Field(ge=3)


class PriorNet(nn.Module):
    """Reads [caption states, caption embedding, log sigma, noised embedding, query] and answers at the query.

    Every layer sees the whole sequence: the causal mask of the paper saves nothing where nothing is
    generated token by token.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2, diffusion prior.
    """

    def __init__(self, spec: PriorNetSpec) -> None:
        super().__init__()
        self.text_in = nn.Linear(spec.text_width, spec.width)
        self.caption_in = nn.Linear(spec.embedding_width, spec.width)
        self.sigma_in = nn.Linear(256, spec.width)
        self.noised_in = nn.Linear(spec.embedding_width, spec.width)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, spec.width))
        self.places = nn.Parameter(0.02 * torch.randn(1, spec.context_length + 4, spec.width))
        heads = spec.width // spec.head_width
        self.blocks = nn.ModuleList(TextBlock(spec.width, heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)
        self.out = nn.Linear(spec.width, spec.embedding_width)

    def read(self, caption: ReadCaption) -> Float[Tensor, " b m w"]:
        """The caption as the first tokens of the sequence; once a request."""
        return torch.cat([self.text_in(caption.states), self.caption_in(caption.embedding)[:, None]], 1)

    def forward(
        self, x: Float[Tensor, " b d"], log_sigma: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b d"]:
        if cond.text is None:
            raise ValueError("the prior is told a caption, but Conditioning.text is None")
        told = self.sigma_in(wave(log_sigma / 4, 256))[:, None]
        query = self.query.expand(len(x), -1, -1)
        sequence = torch.cat([cond.text, told, self.noised_in(x)[:, None], query], 1) + self.places
        for block in self.blocks:
            sequence = block(sequence)
        return self.out(self.norm(sequence[:, -1]))
