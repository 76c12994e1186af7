"""What a request asks of guidance by gradient: how strongly to climb which score, and towards what.

The gradient of a sum of scores is the sum of their gradients, so a sampling may be led by a class, a caption
and a picture at once.  The scores themselves are in `scores`; their networks, a noised classifier and a
noised CLIP, are passed in.
"""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from dd_core.devices import carried
from dd_core.scores import Embed, Features, Score, of_caption, of_class, of_image, of_structure, of_style
from dd_core.scores import weighted as sum_of
from dd_core.spec import Spec

SCORES = ("classes", "caption", "image", "style", "structure")
"""In the order of the columns of `Pull.weights`."""


class GradientSpec(Spec):
    """Weights of the scores; 0 leaves one out.

    For `classes`, 1 is Bayes' rule and more exaggerates; so it is for `caption` and `image`, which are
    multiplied by the noised CLIP's learned scale, as far as a cosine is a log likelihood (`scores`).  `style`
    and `structure` weigh mean squared distances of feature maps, which are small, so these weights are large:
    on the demo's noised CLIP ten million and a thousand (README).
    """

    classes: float = Field(0.0, ge=0)
    """Of the log probability of the label by a noised classifier (arXiv:2105.05233: 0.5 to 10)."""
    caption: float = Field(0.0, ge=0)
    """Of the cosine with the caption by a noised CLIP, times its learned scale (GLIDE: 2 to 3)."""
    image: float = Field(0.0, ge=0)
    """Of the cosine with a reference picture, times the same scale (arXiv:2112.05744)."""
    style: float = Field(0.0, ge=0)
    """Of the closeness of Gram matrices to those of a reference picture."""
    structure: float = Field(0.0, ge=0)
    """Of the closeness of feature maps to those of a reference picture, place by place."""
    moves: Literal["mean", "estimate"] = "mean"
    """What the gradient moves in an ancestral step: the mean by variance * gradient, as published, or the
    estimate by Bayes' rule; the other samplers always move the estimate."""

    @model_validator(mode="after")
    def _pulls(self) -> "GradientSpec":
        if not any(self.weights()):
            raise ValueError(f"gradient pulls nowhere; weigh one of {', '.join(SCORES)}, or leave it out")
        return self

    def weights(self) -> list[float]:
        """In the order of SCORES."""
        return [self.classes, self.caption, self.image, self.style, self.structure]

    def guides(self) -> set[str]:
        """The roles of the networks that the weighed scores need."""
        clip = {"noised_clip"} if any(self.weights()[1:]) else set()
        return clip | ({"classifier"} if self.classes else set()) | ({"clip"} if self.caption else set())

    def refuse_lacking(self, there: Collection[str]) -> None:
        """Raises ValueError if a hop lacks guides that are needed; all that it lacks are named."""
        if lacking := sorted(self.guides() - set(there)):
            raise ValueError(
                f"gradient asks {listed(lacking)}, and this hop has none; name "
                f"{'it' if len(lacking) == 1 else 'them'} in its guides"
            )

    def looks_at_reference(self) -> bool:
        """Whether it needs a reference picture."""
        return any(self.weights()[2:])


def listed(roles: Sequence[str]) -> str:
    """Roles of guides in a sentence: a classifier, a clip and a noised_clip."""
    *others, last = (f"a {role}" for role in roles)
    return " and ".join([", ".join(others), last] if others else [last])


class Pull(NamedTuple):
    """Where the gradient is to lead the samples of a batch, one row per sample; zeros where nothing pulls."""

    weights: Float[Tensor, " b 5"]
    label: Int[Tensor, " b"]
    caption: Float[Tensor, " b d"]
    """Embedded by the CLIP that the noised one was trained with."""
    reference: Float[Tensor, " b c h w"]
    noise: Float[Tensor, " b c h w"]
    """What the reference is noised with, the same at every level."""


class Guides(NamedTuple):
    """The networks that the scores call; None where there is none."""

    logits: Embed | None = None
    embed: Embed | None = None
    features: Features | None = None
    scale: float | Float[Tensor, ""] = 1.0
    """Learned scale of the cosines; a network's stays on its device, since reading it would wait for that."""


def score_of(pull: Pull, guides: Guides) -> Score:
    """The sum of what pulls at least one row; rows with weight 0 have no part in it."""
    kinds = [kind for kind, weight in zip(SCORES, pull.weights.unbind(1), strict=True) if weight.any()]
    there = carried(*pull)

    def score(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        here = Pull(*there(x.device))
        weights = dict(zip(SCORES, here.weights.unbind(1), strict=True))
        return sum_of(*(weighed(kind, weights[kind], here, guides) for kind in kinds))(x, sigma)

    return score


def weighed(kind: str, weight: Float[Tensor, " b"], pull: Pull, guides: Guides) -> tuple[Tensor, Score]:
    """The weights, one per row, of the score that `kind` names, and this score."""
    if kind == "classes":
        assert guides.logits is not None
        return weight, of_class(guides.logits, pull.label)
    assert guides.embed is not None
    assert guides.features is not None

    def noise(like: Tensor) -> Tensor:
        return pull.noise.to(like)

    match kind:
        case "caption":
            return guides.scale * weight, of_caption(guides.embed, pull.caption)
        case "image":
            return guides.scale * weight, of_image(guides.embed, pull.reference, noise)
        case "style":
            return weight, of_style(guides.features, pull.reference, noise)
        case _:
            return weight, of_structure(guides.features, pull.reference, noise)


def stacked(pulls: Sequence[Pull | None], counts: Sequence[int]) -> Pull | None:
    """One batch out of the pulls of several requests; None pulls nowhere, and if all are None, so is this."""
    given = next((pull for pull in pulls if pull is not None), None)
    if given is None:
        return None
    whole = [idle(given, count) if pull is None else pull for pull, count in zip(pulls, counts, strict=True)]
    return Pull(*(torch.cat(column) for column in zip(*whole, strict=True)))


def idle(like: Pull, count: int) -> Pull:
    """`count` rows that pull nowhere."""
    return Pull(*(part.new_zeros(count, *part.shape[1:]) for part in like))
