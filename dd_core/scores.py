"""Scores: what guidance by gradient climbs, log p(y | x) or a substitute for it, one value per sample.

Each function here returns a score, (noisy images, their levels) -> one number per sample, to be weighted,
added up and given to `guidance.by_gradient`.  The networks are callables that read noisy images: a noised
classifier, or the `embed_image` and `features` of a noised CLIP.  No score mixes samples.

Which of them are log likelihoods, so that weight 1 is Bayes' rule:

- class: yes, of the classifier, which is trained to be one at each level.
- caption, image: not by themselves.  exp(scale * cosine) is the likelihood of a caption up to a constant
  where its sum over all captions is the same whatever x is, as if they lay evenly on the sphere (von
  Mises-Fisher), and the scale fits each level.  InfoNCE learns it up to that sum, which the score leaves out.
- structure: yes, if features are observed with noise of deviation d at all n values of a map, with weight
  n / 2 d**2, which grows as a level leaves less uncertainty; with one weight for all levels, no.
- style: no; that would take noise added to the Gram matrices.  It is a distance to reduce, no more.

Sources: Dhariwal & Nichol 2021 (arXiv:2105.05233, class), Nichol et al. 2022 (arXiv:2112.10741, text),
Liu et al. 2021 (arXiv:2112.05744, section 3: text, image, style, structure).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dd_core.noise import Noise, spread

Score = Callable[[Float[Tensor, " b *s"], Float[Tensor, " b"]], Float[Tensor, " b"]]
Embed = Callable[[Float[Tensor, " b *s"], Float[Tensor, " b"]], Float[Tensor, " b d"]]
"""Noisy images -> class logits, or unit vectors."""
Features = Callable[[Float[Tensor, " b *s"], Float[Tensor, " b"]], Sequence[Float[Tensor, " _ _ _ _"]]]
"""Noisy images -> feature maps, one for each layer that is looked at, each of its own size."""


def of_class(logits: Embed, labels: Int[Tensor, " b"]) -> Score:
    """The log probability of labels, by a noised classifier."""

    def score(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return -F.cross_entropy(logits(x, sigma), labels.to(x.device), reduction="none")

    return score


def of_caption(embed: Embed, caption: Float[Tensor, " b d"]) -> Score:
    """Cosine with an embedded caption (weight: GLIDE its logit scale, semantic guidance 160)."""

    def score(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (embed(x, sigma) * caption.to(x)).sum(-1)

    return score


def of_image(embed: Embed, reference: Float[Tensor, " b *s"], noise: Noise) -> Score:
    """Cosine with a reference image noised to the same level (weight: semantic guidance 100)."""

    def score(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        with torch.no_grad():
            target = embed(noised(reference, sigma, noise), sigma)
        return (embed(x, sigma) * target).sum(-1)

    return score


def of_style(features: Features, reference: Float[Tensor, " b *s"], noise: Noise) -> Score:
    """Minus the squared distance of Gram matrices to those of a reference at the same level.

    Positions are ignored: only the correlations of channels are compared.
    """

    def score(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        with torch.no_grad():
            wanted = [gram(layer) for layer in features(noised(reference, sigma, noise), sigma)]
        return -distance([gram(layer) for layer in features(x, sigma)], wanted)

    return score


def of_structure(features: Features, reference: Float[Tensor, " b *s"], noise: Noise) -> Score:
    """Minus the squared distance, place by place, of feature maps to those of a reference at this level."""

    def score(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        with torch.no_grad():
            wanted = features(noised(reference, sigma, noise), sigma)
        return -distance(features(x, sigma), wanted)

    return score


def weighted(*parts: tuple[float | Float[Tensor, " b"], Score]) -> Score:
    """The sum of scores, each with its weight: one for all samples, or one per sample."""

    def score(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        total = torch.zeros_like(sigma)
        for weight, part in parts:
            total = total + (weight.to(sigma) if isinstance(weight, Tensor) else weight) * part(x, sigma)
        return total

    return score


def noised(image: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"], noise: Noise) -> Float[Tensor, " b *s"]:
    """A clean image at a noise level; if `noise` is the same at every call, only the level changes it."""
    return image + spread(sigma, image) * noise(image)


def gram(features: Float[Tensor, " b c h w"]) -> Float[Tensor, " b c c"]:
    """Gram matrix of the channels of each sample (Gatys et al. 2016, eq. 3), over their number of values."""
    flat = features.flatten(2)
    return flat @ flat.mT / flat[0].numel()


def distance(
    layers: Sequence[Float[Tensor, " b ..."]], wanted: Sequence[Float[Tensor, " b ..."]]
) -> Float[Tensor, " b"]:
    """Mean squared difference of each sample, mean over layers."""
    pairs = zip(layers, wanted, strict=True)
    return torch.stack([(a - b).square().flatten(1).mean(1) for a, b in pairs]).mean(0)
