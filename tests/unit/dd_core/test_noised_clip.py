"""The noised CLIP begins as its parent, hears sigma, and learns to find captions through noise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dd_core import bundle
from dd_core.images import to_unit
from dd_core.losses import info_nce, same_captions
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.schedules import ScheduleSpec, sigmas
from dd_core.stage import Budget, OptimizerSpec, PairBatch, Trained
from dd_core.stages import build_stage
from dd_core.stages.clip import ClipSpec
from dd_core.stages.noised_clip import NoisedClip, NoisedClipSpec, NoisedClipStage, noised_clip_of
from dd_core.training import TrainState, train

NET = ClipNetSpec(
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
SPEC = NoisedClipSpec(net=NET)


def parent(net: ClipNetSpec = NET) -> Trained:
    torch.manual_seed(0)
    return Trained(ClipSpec(net=net), Clip(net).state_dict())


def colours() -> Iterator[PairBatch]:
    """Eight flat colours, each with a caption of its own."""
    bits = torch.arange(8)[:, None] >> torch.arange(3) & 1
    image = (bits * 255).byte()[:, :, None, None].expand(8, 3, 16, 16)
    tokens = torch.zeros(8, 8, dtype=torch.long)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 1, torch.arange(8) + 2, 63
    while True:
        yield PairBatch(image=image, tokens=tokens)


@pytest.mark.parametrize("stem", ["patch", "convolutions"])
def test_it_begins_as_its_parent_on_clean_images(stem: str) -> None:
    net = NET.but(stem=stem)
    stage = NoisedClipStage(NoisedClipSpec(net=net), parent(net))
    x0 = torch.rand(4, 3, 16, 16) * 2 - 1
    clip = stage.frozen[0]
    assert isinstance(clip, Clip)
    torch.testing.assert_close(stage.model.embed_image(x0, torch.zeros(4)), clip.embed_image(x0))


def test_a_stem_of_convolutions_needs_a_patch_that_halving_reaches() -> None:
    with pytest.raises(ValueError, match="patch_size 6 is no power of 2"):
        NET.but(stem="convolutions", patch_size=6, image_size=18)


def test_every_image_is_told_its_own_sigma() -> None:
    torch.manual_seed(0)
    model = NoisedClip(NET)
    torch.nn.init.normal_(model.level[2].weight)
    x, sigma = torch.randn(3, 3, 16, 16), torch.tensor([0.1, 1.0, 10.0])
    alone = torch.cat([model.embed_image(x[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model.embed_image(x, sigma), alone)
    scaled = x / (1 + sigma[:, None, None, None] ** 2).sqrt()  # what the patches see
    same_patches = model.embed_image(scaled, torch.zeros(3))
    assert (model.embed_image(x, sigma) - same_patches).norm(dim=1).min() > 1e-3


def test_guidance_can_climb_its_gradient() -> None:
    """A small step along the gradient at x raises the cosine by the squared length of the gradient."""
    torch.manual_seed(0)
    model = NoisedClip(NET).double()
    caption = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1).double()
    x, sigma = torch.randn(2, 3, 16, 16).double().requires_grad_(), torch.tensor([0.5, 2.0]).double()
    cosine = (model.embed_image(x, sigma) * caption).sum(-1)
    (grad,) = torch.autograd.grad(cosine.sum(), x)
    slope = grad.square().flatten(1).sum(1)
    raised = (model.embed_image(x + 1e-2 * grad, sigma) * caption).sum(-1) - cosine
    torch.testing.assert_close(raised / 1e-2, slope, rtol=0.05, atol=0)


@pytest.mark.parametrize("target", ["caption", "clip"])
def test_it_learns_to_find_what_noise_hides(target: str) -> None:
    stage = NoisedClipStage(SPEC.but(target=target), parent())
    optimizer = OptimizerSpec(learning_rate=3e-3, warmup_steps=1, precision="fp32")
    budget = Budget(steps=60, checkpoint_every=100)
    log = [
        r.read() for r in train(TrainState(stage, optimizer), colours(), optimizer=optimizer, budget=budget)
    ]
    last = sum(metrics["retrieval"] for metrics in log[-10:]) / 10
    assert last > 0.5  # chance is 1 / 8


@pytest.mark.parametrize("schedule", [None, ScheduleSpec()])
def test_it_learns_at_the_levels_of_its_chain_or_about_sigma_one(schedule: ScheduleSpec | None) -> None:
    stage, batch = NoisedClipStage(SPEC.but(schedule=schedule), parent()), next(colours())
    torch.manual_seed(1)
    loss = stage(batch).total
    torch.manual_seed(1)
    x0 = to_unit(batch.image)
    if schedule is None:  # as it was before there was a choice
        sigma = (1.4 * torch.randn_like(x0[:, 0, 0, 0])).exp()
    else:
        sigma = sigmas(schedule).float()[torch.randint(schedule.num_timesteps, (8,))]
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    clip = stage.frozen[0]
    assert isinstance(clip, Clip)
    model, target = stage.model, clip.read(batch.tokens).embedding
    expected = info_nce(
        model.embed_image(x, sigma), target, model.logit_scale(), same_captions(batch.tokens, batch.tokens)
    )
    torch.testing.assert_close(loss, expected)


def test_the_parent_is_not_trained_and_does_not_ship() -> None:
    given = parent()
    stage = NoisedClipStage(SPEC, given)
    stage(next(colours())).total.backward()
    assert all(parameter.grad is None for parameter in stage.frozen[0].parameters())
    assert not any("text" in name or "token" in name for name in stage.state_dict())


def test_a_bundle_embeds_as_the_model_did(tmp_path: Path) -> None:
    stage = NoisedClipStage(SPEC, parent())
    bundle.save(tmp_path / "b", SPEC, stage.model.state_dict(), parents={"clip": "0" * 64}, facts={})
    loaded = noised_clip_of(bundle.load(tmp_path / "b").trained)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 3.0])
    torch.testing.assert_close(loaded.embed_image(x, sigma), stage.model.eval().embed_image(x, sigma))


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="needs the parent 'clip'"):
        build_stage(SPEC, {})
    with pytest.raises(
        ValueError, match=r"net.embedding_width is 8, net.embedding_width of its parent clip is 16; make"
    ):
        build_stage(NoisedClipSpec(net=NET.but(embedding_width=8)), {"clip": parent()})
    with pytest.raises(ValueError, match=r"net.image_layers is 3, its parent's 2; or set start: random"):
        build_stage(NoisedClipSpec(net=NET.but(image_layers=3)), {"clip": parent()})
    with pytest.raises(ValueError, match="reads 16 px and got"):
        NoisedClip(NET).embed_image(torch.zeros(1, 3, 32, 32), torch.ones(1))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [part for part in tree_leaves(out) if isinstance(part, torch.Tensor)]
        self.numel = max([self.numel, *(part.numel() for part in made)])
        return out


def test_equal_captions_are_found_without_comparing_token_by_token() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(3, (64, 77))
    tokens[:, 2:] = 0
    with Largest() as largest:
        found = same_captions(tokens, tokens)
    assert torch.equal(found, (tokens[:, None] == tokens[None]).all(-1))
    assert 64 < found.sum() < 64 * 64
    assert largest.numel <= max(64 * 64, tokens.numel())
