"""The noised classifier learns labels at every noise level, and its gradient leads a sampling to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_core.denoiser import Denoised
from dd_core.guidance import by_gradient
from dd_core.nets.classifier import ClassifierSpec as NetSpec
from dd_core.nets.unet import UNetSpec
from dd_core.noise import karras_sigmas
from dd_core.samplers import dpmpp_2m, sample
from dd_core.scores import of_class
from dd_core.stage import Budget, OptimizerSpec, PairBatch
from dd_core.stages import build_stage
from dd_core.stages.classifier import ClassifierSpec, NoisedClassifier
from tests.prepared import write_prepared
from workflows.feed import Wanted, prepared_files, survey
from workflows.labels import LabelSpec
from workflows.row_groups import DataError
from workflows.train_spec import TrainSpec
from workflows.training import refuse_unlabelled, train_stage

UNET = UNetSpec(width=16, channel_mult=(1, 2), blocks_per_level=1, attention_at=(), head_width=8, groups=4)
SPEC = ClassifierSpec(net=NetSpec(unet=UNET, image_size=16, classes=2), log_sigma_mean=0.0)


def batch(size: int = 32) -> PairBatch:
    """Class 0 is dark, class 1 bright, each pixel a little different; one in four has no label."""
    label = torch.randint(0, 2, (size,))
    image = (60 + 130 * label[:, None, None, None] + torch.randint(0, 30, (size, 3, 16, 16))).to(torch.uint8)
    return PairBatch(
        image, torch.zeros(size, 4, dtype=torch.long), torch.where(torch.rand(size) < 0.25, -1, label)
    )


@pytest.fixture(scope="module")
def trained() -> NoisedClassifier:
    torch.manual_seed(0)
    stage = build_stage(SPEC, {})
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    for _ in range(60):
        found = stage(batch())
        found.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found.parts["accuracy"] > 0.9
    assert 0.5 < found.parts["labelled"] < 1
    assert isinstance(stage.model, NoisedClassifier)
    return stage.model.eval().requires_grad_(False)


def test_unlabelled_images_teach_nothing() -> None:
    torch.manual_seed(1)
    stage, found = build_stage(SPEC, {}), batch(8)
    nothing = found._replace(label=torch.full((8,), -1))
    loss = stage(nothing).total
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in stage.parameters())


def test_its_gradient_leads_a_sampling_that_knows_no_classes(trained: NoisedClassifier) -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Denoised:
        """Images of one grey each, the grey normal around 0 with deviation .5: exact."""
        pixels = x[0].numel()
        shrink = 0.25 / (0.25 + sigma**2 / pixels)
        return Denoised((shrink * x.mean((1, 2, 3)))[:, None, None, None].expand_as(x))

    torch.manual_seed(2)
    labels = torch.tensor([0, 1] * 8)
    sigmas = karras_sigmas(12, sigma_min=0.05, sigma_max=5.0)
    start = 5 * torch.randn(16, 3, 16, 16)
    drawn = {}
    for scale in (0.0, 3.0):
        guided = by_gradient(denoise, of_class(trained, labels), scale=torch.full((16,), scale))
        drawn[scale] = sample(dpmpp_2m(start, sigmas), guided)
    score = {
        scale: of_class(trained, labels)(x, torch.full((16,), 0.05)).mean() for scale, x in drawn.items()
    }
    assert score[3.0] > score[0.0] + 0.2
    assert drawn[3.0][labels == 1].mean() > drawn[3.0][labels == 0].mean() + 0.3


ABOUT = {
    "name": "classifier",
    "stage": SPEC,
    "optimizer": OptimizerSpec(learning_rate=1e-3),
    "budget": Budget(steps=1, checkpoint_every=1),
    "batch_size": 2,
}


def test_labels_must_be_named_and_as_many_as_the_network_has() -> None:
    with pytest.raises(ValueError, match=r"set label\.path and label\.classes"):
        TrainSpec.model_validate(ABOUT)
    with pytest.raises(ValueError, match=r"classes is 2, but label\.classes names 3"):
        TrainSpec.model_validate(ABOUT | {"label": LabelSpec(path="a", classes=("x", "y", "z"))})


@pytest.mark.parametrize("label", [{"path": "things.0.m"}, {"path": "things.0.n", "classes": ("one", "two")}])
def test_data_in_which_nothing_has_a_label_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: dict[str, Any]
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    spec = TrainSpec.model_validate(ABOUT | {"label": {"classes": ("0", "1")} | label})
    said = rf"at '{label['path']}' none has one of .*; a json is .*things.*; mend label\.path"
    with pytest.raises(DataError, match=said):
        train_stage(spec, run=tmp_path / "run", data=write_prepared(tmp_path / "data"))


def test_one_pair_with_a_label_is_enough(tmp_path: Path) -> None:
    files = prepared_files(write_prepared(tmp_path / "data"))
    only = LabelSpec(path="things.0.n", classes=("2", "none"))
    refuse_unlabelled(survey(files, Wanted(16, only)), only)
