"""Scores: each sample has its own, they rise along their gradient, and style forgets places."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core import scores
from dd_core.denoiser import Denoised
from dd_core.guidance import by_gradient
from dd_core.nets.clip import ClipNetSpec
from dd_core.stages.noised_clip import NoisedClip

COUNT, SHAPE = 4, (4, 3, 8, 8)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KERNELS = drawn(6, 3, 3, 3, seed=1) / 5, drawn(5, 6, 3, 3, seed=2) / 7
REFERENCE, EPS, CAPTION = drawn(*SHAPE, seed=3), drawn(*SHAPE, seed=4), F.normalize(drawn(COUNT, 5, seed=5))


def features(x: Tensor, sigma: Tensor) -> list[Tensor]:
    """Two maps that depend on the noise level."""
    first = torch.tanh(F.conv2d(x / (1 + sigma**2).sqrt()[:, None, None, None], KERNELS[0]))
    return [first, F.conv2d(first + sigma.cos()[:, None, None, None], KERNELS[1])]


def embed(x: Tensor, sigma: Tensor) -> Tensor:
    return F.normalize(features(x, sigma)[1].mean((2, 3)), dim=-1)


def rows_of(start: int, stop: int) -> dict[str, scores.Score]:
    """Every score, for some of the samples."""

    def noise(like: Tensor) -> Tensor:
        return EPS[start:stop]

    caption, reference = CAPTION[start:stop], REFERENCE[start:stop]
    found = {
        "class": scores.of_class(lambda x, s: 3 * embed(x, s), torch.arange(COUNT)[start:stop]),
        "caption": scores.of_caption(embed, caption),
        "image": scores.of_image(embed, reference, noise),
        "style": scores.of_style(features, reference, noise),
        "structure": scores.of_structure(features, reference, noise),
    }
    per_sample = torch.tensor([1.0, 2.0, 0.0, 5.0])[start:stop]
    found["sum"] = scores.weighted((160.0, found["caption"]), (per_sample, found["style"]))
    return found


@pytest.mark.parametrize("name", rows_of(0, 1))
def test_no_score_mixes_the_samples_of_a_batch(name: str) -> None:
    x = drawn(*SHAPE, seed=6)

    def slopes(score: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        value = score(leaf, sigma)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    together = slopes(rows_of(0, COUNT)[name], x, SIGMA)
    for i in range(COUNT):
        alone = slopes(rows_of(i, i + 1)[name], x[i : i + 1], SIGMA[i : i + 1])
        torch.testing.assert_close(together[0][i : i + 1], alone[0])
        torch.testing.assert_close(together[1][i : i + 1], alone[1])


@pytest.mark.parametrize("name", rows_of(0, 1))
def test_guidance_raises_its_score(name: str) -> None:
    score, x = rows_of(0, COUNT)[name], drawn(*SHAPE, seed=6)
    step = 1e-4 / SIGMA**2
    guided = by_gradient(lambda x, sigma: Denoised(x), score, scale=step)(x, SIGMA).x0
    gained = score(guided, SIGMA) - score(x, SIGMA)
    assert (gained[score(x, SIGMA) != 0] > 0).all()


def test_the_reference_itself_scores_best() -> None:
    found = rows_of(0, COUNT)
    x = REFERENCE + SIGMA[:, None, None, None] * EPS
    ones, zeros = torch.ones(COUNT).double(), torch.zeros(COUNT).double()
    torch.testing.assert_close(found["image"](x, SIGMA), ones)
    for name in ("style", "structure"):
        torch.testing.assert_close(found[name](x, SIGMA), zeros)
        assert (found[name](drawn(*SHAPE, seed=8), SIGMA) < 0).all()


def test_style_forgets_places_and_structure_does_not() -> None:
    def pixels(x: Tensor, sigma: Tensor) -> list[Tensor]:
        return [x]

    moved, sigma = REFERENCE.roll((2, 3), (2, 3)), torch.zeros(COUNT).double()
    style = scores.of_style(pixels, REFERENCE, torch.zeros_like)
    structure = scores.of_structure(pixels, REFERENCE, torch.zeros_like)
    assert style(moved, sigma).abs().max() < 1e-12
    assert structure(moved, sigma).max() < -0.1


def test_a_class_score_is_the_log_of_its_probability() -> None:
    logits = drawn(COUNT, 5)
    score = scores.of_class(lambda x, sigma: logits, torch.tensor([0, 4, 2, 2]))
    expected = logits.softmax(-1)[torch.arange(4), [0, 4, 2, 2]].log()
    torch.testing.assert_close(score(drawn(*SHAPE), SIGMA), expected)


def test_a_noised_clip_has_maps_to_guide_by() -> None:
    """Their last is what the embedding is made of, and all feel x."""
    torch.manual_seed(0)
    spec = ClipNetSpec(
        embedding_width=16,
        image_size=16,
        patch_size=8,
        image_width=32,
        image_layers=2,
        context_length=8,
        text_width=16,
        text_layers=1,
        head_width=16,
        vocab_size=64,
    )
    model = NoisedClip(spec)
    x, sigma = torch.randn(2, 3, 16, 16, requires_grad=True), torch.tensor([0.3, 3.0])
    maps = model.features(x, sigma)
    assert [one.shape for one in maps] == [(2, 32, 2, 2)] * 2
    states = model.visual.transformer(model.begun(x, sigma))
    torch.testing.assert_close(maps[-1], states[:, 1:].mT.unflatten(2, (2, 2)))
    reference = torch.randn(2, 3, 16, 16)
    for score in (scores.of_style, scores.of_structure):
        value = score(model.features, reference, torch.randn_like)(x, sigma)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert slope.flatten(1).norm(dim=1).min() > 0
