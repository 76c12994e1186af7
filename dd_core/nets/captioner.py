"""Predicts an image's caption from its embedding, word by word: an auxiliary task for CLIP, dropped later.

The contrastive loss needs of an embedding only what distinguishes its image from the others of a batch;
writing the caption needs all that it says.  A CLIP trained for minutes learns both sooner with this task
(README, experiments).

Source: Yu et al. 2022 (arXiv:2205.01917, CoCa, section 3.2), here from the embedding alone that CLIP ships.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_core.nets import text

PLACES = 4
"""Places that the embedding takes at the start of the sequence, before the words."""


class Captioner(nn.Module):
    """Image embedding and the words so far -> the next word.

    Args:
        embedding_width: Of the image embedding.
        width: Of the text tower, whose states and word vectors it uses.
        layers: Transformer layers of the captioner itself.
        head_width: Of their attention.
    """

    def __init__(self, *, embedding_width: int, width: int, layers: int, head_width: int) -> None:
        super().__init__()
        self.loud = embedding_width**0.5
        self.image_in = nn.Linear(embedding_width, PLACES * width)
        self.told = nn.Linear(embedding_width, width)
        self.blocks = nn.ModuleList(text.TextBlock(width, width // head_width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        embedding: Float[Tensor, " b d"],
        states: Float[Tensor, " b l w"],
        tokens: Int[Tensor, " b l"],
        words: Float[Tensor, " v w"],
    ) -> Float[Tensor, " b l-1"]:
        """Negative log-likelihood in nats of each word after the first, up to END; zero after END.

        Args:
            embedding: Unit vectors of the images.
            states: Of the captions, by a causal text tower, so that no place knows later words.
            tokens: The captions.
            words: A vector for each word of the vocabulary; only words of this batch are in the softmax.
        """
        embedding = embedding * self.loud
        image = self.image_in(embedding).unflatten(1, (PLACES, -1))
        x = torch.cat([image, states[:, :-1] + self.told(embedding)[:, None]], 1)
        length = x.shape[1]
        earlier = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, earlier)
        present, places = torch.unique(tokens, return_inverse=True)
        logits = self.norm(x[:, PLACES:]) @ words[present].T * words.shape[1] ** -0.5
        nats = F.cross_entropy(logits.float().transpose(1, 2), places[:, 1:], reduction="none")
        ends = tokens.argmax(1, keepdim=True)
        written = torch.arange(nats.shape[1], device=nats.device) < ends
        return nats * written
