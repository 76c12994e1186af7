"""Several embeddings drawn for each caption, of which a prior keeps one.

unCLIP draws two and keeps the one nearer to its caption.  An embedding may be near and yet lie between
pictures, so where the cascade has a draft, it paints each draw, CLIP embeds the pictures, and these are
compared: an embedding between pictures is painted as one of them, or as none.  The stage `prior` tells how
likely an embedding is for a caption, and keeps the draw whose picture is likeliest.  Other priors keep the
draw whose picture is nearest, in sum, to the caption (DALL-E's re-ranking, before the first pixel is
denoised) and to the draw itself.

Sources: Ramesh et al. 2022 (arXiv:2204.06125, section 2.2: two draws, the nearer one); Ramesh et al. 2021
(arXiv:2102.12092, section 2.6: pictures ranked by a contrastive model); Li et al. 2023 (arXiv:2303.16203:
what a diffusion model finds likeliest is what it denoises with the least error).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dd_core.cascade import CascadeState
from dd_core.denoiser import Conditioning
from dd_core.embeddings import nearness
from dd_core.guidance import Rows, rows_of
from dd_core.nets.clip import Clip
from dd_core.nets.draft import Draft
from dd_core.samplers import SamplingSpec
from dd_core.stages.captions import away_from
from dd_core.stages.draft import drawn

STRIDE = 0x9E3779B9
"""Step from the seed of a draw to that of the next, modulo 2**32, since a CPU generator uses only 32 bits;
odd, so that no two draws of a request share one; 2**32 over the golden ratio, so that they are far apart."""

Fit = Callable[[Int[Tensor, "b l"], Float[Tensor, "b k d"]], Float[Tensor, "b k"]]
"""Captions and, for each, k embeddings as unit vectors -> how well each embedding fits its caption; more is
better, and only those of one caption are compared."""


def seeds_of_draws(seeds: Sequence[int], draws: int) -> list[int]:
    """A seed for each draw, those of one request side by side; the first is the request's own."""
    return [(seed + draw * STRIDE) % 2**32 for seed in seeds for draw in range(draws)]


def rows_of_draws(
    state: CascadeState, how: SamplingSpec, told: Callable[[Int[Tensor, " b l"]], Conditioning]
) -> Rows:
    """The rows of a request's draws; each caption is read once for all of its draws.

    Args:
        state: The request.
        how: How it is sampled.
        told: Captions -> their conditioning, one row for each.
    """
    each = torch.arange(len(state.seeds)).repeat_interleave(how.draws)
    cond = told(state.tokens).pick(each)
    without = cond if how.guidance_scale == 1 else told(away_from(state, silent=True)).pick(each)
    return rows_of(how, cond, without, len(each))


class Chooser:
    """Keeps one embedding of those drawn for a caption.

    Args:
        clip: Embeds caption and pictures, to compare them.
        draft: Paints a draw; None: the draws themselves are compared.

    Raises:
        ValueError: The draft paints embeddings of another width.
    """

    def __init__(self, clip: Clip, draft: Draft | None) -> None:
        self.clip, self.draft = clip, draft
        if draft is not None and (width := draft.whitening.mean.shape[0]) != clip.spec.embedding_width:
            raise ValueError(
                f"the draft among the guides paints embeddings of {width} numbers, the prior's have "
                f"{clip.spec.embedding_width}; name the draft of the same CLIP"
            )

    @torch.no_grad()
    def kept(self, state: CascadeState, x0: Float[Tensor, " kb d"], fit: Fit | None = None) -> CascadeState:
        """The best of each request's draws, a unit vector, as its image embedding.

        Args:
            state: The requests.
            x0: Their draws, those of one request side by side.
            fit: How well an embedding fits a caption; None: by nearness to caption and draw.
        """
        flat = F.normalize(x0.float(), dim=-1)
        draws = flat.unflatten(0, (len(state.seeds), -1))
        if draws.shape[1] == 1:
            return state._replace(image_embedding=flat.cpu())
        pictures = flat if self.draft is None else self.clip.embed_image(drawn(self.draft, flat))
        seen, tokens = pictures.view_as(draws), state.tokens.to(x0.device)
        fits = fit(tokens, seen) if fit else nearness(draws, self.clip.read(tokens).embedding, seen)
        best = fits.argmax(1)
        return state._replace(image_embedding=draws[torch.arange(len(best)), best].cpu())
