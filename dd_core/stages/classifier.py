"""The noised classifier: noisy image -> class, to guide a sampling by its gradient (scores.of_class).

Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4; with a `schedule` at uniform timesteps, as
published.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from dd_core import images
from dd_core.denoiser import Tell
from dd_core.labels import UNLABELLED
from dd_core.nets import classifier as nets
from dd_core.noise import spread
from dd_core.ranks import gathered
from dd_core.schedules import Clock
from dd_core.stage import Losses, PairBatch, Stage, Trained
from dd_core.stages.guide_levels import GuideLevels, GuideSpec


class ClassifierSpec(GuideSpec):
    """Noisy image -> one of net.classes.  It is told timesteps where it has a schedule, as published."""

    kind: Literal["noised_classifier"] = "noised_classifier"
    net: nets.ClassifierSpec

    @model_validator(mode="after")
    def _is_told(self) -> "ClassifierSpec":
        scale = self.net.unet.level_scale
        if self.schedule is not None and scale != 1:
            raise ValueError(
                f"net.unet.level_scale is {scale:g}, and timesteps are told as they are; set it to 1, or "
                "leave schedule out"
            )
        return self

    @property
    def classes(self) -> int:
        """Classes of the data."""
        return self.net.classes

    @property
    def image_size(self) -> int:
        """Side of the prepared images that it trains on."""
        return self.net.image_size

    @property
    def compares(self) -> bool:
        """True: the loss is a mean over the images of a forward that have a label."""
        return True

    @property
    def gathers(self) -> bool:
        """True: over those of every worker."""
        return True


class NoisedClassifier(nn.Module):
    """The network, asked in the sigma frame."""

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.network = nets.Classifier(spec.net)
        self.tell: Tell = torch.log if spec.schedule is None else Clock(spec.schedule)

    def forward(self, x: Float[Tensor, " b c h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, " b k"]:
        """Logits of x = x0 + sigma eps."""
        logits: Tensor = self.network(x * torch.rsqrt(1 + spread(sigma, x) ** 2), self.tell(sigma))
        return logits.float()


class ClassifierStage(Stage):
    """Cross-entropy of the labels; images without one are left out, `labelled` is the share of the others."""

    model: NoisedClassifier

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec
        self.levels = GuideLevels(spec)
        self.model = NoisedClassifier(spec)

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        """Raises ValueError if the batch has no labels."""
        if batch.label is None:
            raise ValueError("noised_classifier learns labels; set `label` (path and classes) of the run")
        known, x0 = batch.label != UNLABELLED, images.to_unit(batch.image)
        sigma = self.levels(x0)
        logits = self.model(x0 + spread(sigma, x0) * torch.randn_like(x0), sigma)
        each = F.cross_entropy(logits, batch.label, ignore_index=UNLABELLED, reduction="none")
        count = known.sum().clamp(min=1)
        right = ((logits.argmax(1) == batch.label) & known).sum()
        clear = known & (sigma < 1)
        parts = {
            "labelled": known.float().mean(),
            "accuracy": right / count,
            "accuracy_clear": ((logits.argmax(1) == batch.label) & clear).sum() / clear.sum().clamp(min=1),
        }
        of_ranks = gathered(known.sum()[None]).float()
        share = of_ranks.mean().clamp(min=1 / len(of_ranks))  # DDP then takes the mean of the ranks
        return Losses(each.sum() / share, parts)


def classifier_of(trained: Trained) -> NoisedClassifier:
    """A trained classifier, ready to guide.

    Raises:
        ValueError: It is another stage.
    """
    if not isinstance(trained.spec, ClassifierSpec):
        raise ValueError(f"the parent 'classifier' is a {type(trained.spec).__name__}")
    model = NoisedClassifier(trained.spec)
    model.load_state_dict(trained.weights)
    return model.eval().requires_grad_(False)
