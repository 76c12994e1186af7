"""Nothing of a GPU's work is left behind on the CPU: shown on a device that is not one, with no GPU."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dd_core.cascade import CascadeState, requested
from dd_core.cascade import run as paint
from dd_core.devices import imagined
from dd_core.nets.code_prior import CodePrior
from dd_core.nets.whitening import Whitening
from dd_core.samplers import SamplingSpec
from dd_core.stage import PairBatch, Stage, Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.causal_prior import PriorDenoiser
from dd_core.stages.chain_bits import bits_of, table_of
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.clip import ClipSpec, clip_of
from dd_core.training import TrainState, train
from dd_core.variations import Encoder, encode
from jobs.config import run_spec
from jobs.recipes import demo
from tests.elsewhere import elsewhere
from workflows import samples
from workflows.clip_judge import reading
from workflows.estimate import nothing
from workflows.run_spec import RunSpec

Changes = dict[str, Any]

TRAINED = {
    "demo": ("clip", "autoencoder", "noised_clip", "draft", "base", "upsampler", "prior"),
    "consistency": ("consistency",),
    "consistency.alone": ("consistency",),
    "consistency.edm": ("base", "consistency"),
    "autoregressive": ("autoregressive_prior",),
    "improved_ddpm.inpainting": ("base", "filling"),
    "guided.classes": ("classifier",),
    "guided": ("noised_clip",),
    "glide.clip_guided": ("noised_clip",),
    "glide.inpainting": ("guided", "upsampler", "filling", "filling_upsampler"),
    "latent.vq": ("autoencoder",),
    "latent.joint": ("base", "joint"),
    "unclip.small_causal": ("causal_prior", "decoder", "upsampler"),
}
"""Recipe -> those of its stages that differ from all above."""

HOPS: dict[str, tuple[str, str, Changes, tuple[str, ...]]] = {
    "prior": ("smoke", "prior", {"draws": 2}, ()),
    "prior, ddim": ("smoke", "prior", {"sampler": "ddim", "eta": 1.0}, ()),
    "autoregressive prior": ("autoregressive", "autoregressive_prior", {"draws": 2}, ()),
    "causal prior": ("unclip.small_causal", "causal_prior", {"num_steps": 8}, ()),
    "base": ("smoke", "base", {}, ("image_embedding",)),
    "base, ddim": ("smoke", "base", {"sampler": "ddim", "eta": 1.0}, ("image_embedding",)),
    "base, heun": ("smoke", "base", {"sampler": "heun", "churn": {}}, ("image_embedding",)),
    "base, rescaled": (
        "smoke",
        "base",
        {"guidance_scale": 3.0, "guidance_rescale": 0.7, "guidance_interval": (0.3, 5.0)},
        ("image_embedding",),
    ),
    "base, threshold": (
        "smoke",
        "base",
        {"guidance_scale": 3.0, "dynamic_threshold": 0.9},
        ("image_embedding",),
    ),
    "base, varied": ("smoke", "base", {"strength": 0.5, "num_steps": 4}, ("image_embedding", "known")),
    "base, hole": ("smoke", "base", {"inpainting": "projection"}, ("image_embedding", "known", "hole")),
    "upsampler": ("smoke", "upsampler", {}, ("image",)),
    "student of the base": ("consistency", "consistency", {}, ("image_embedding",)),
    "chain": ("ddpm", "base", {}, ()),
    "chain of classes": ("improved_ddpm", "base", {"guidance_scale": 3.0}, ("label",)),
    "chain that fills": ("glide.inpainting", "filling", {"guidance_scale": 3.0}, ("known", "hole")),
    "chain that enlarges": ("unclip.small_causal", "upsampler", {}, ("image",)),
    "chain of embeddings": (
        "unclip.small",
        "decoder",
        {"guidance_scale": 3.0},
        ("image_embedding",),
    ),
    "chain of latents": ("latent", "base", {"num_steps": 2}, ()),
    "chain of latents, hole": ("latent.inpainting", "filling", {"num_steps": 2}, ("known", "hole")),
    "chain with its own reader": ("latent.joint", "joint", {"num_steps": 2}, ()),
    "led by a classifier": ("guided.classes", "base", {}, ("label",)),
    "led by a noised CLIP": (
        "guided",
        "base",
        {"gradient": {"caption": 2.0, "image": 0.5, "style": 50.0, "structure": 3.0}},
        ("reference",),
    ),
    "student": ("consistency.classes", "consistency", {"num_steps": 4}, ("label",)),
    "student, hole": ("consistency.alone", "consistency", {}, ("label", "known", "hole")),
    "student, colours": ("consistency.alone", "consistency", {}, ("label", "gray")),
    "student, enlarged": ("consistency.alone", "consistency", {}, ("label", "coarse")),
}
"""What is painted: recipe, stage, changes to how it is sampled there, and what else is told."""


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """A process in which PyTorch may learn of another kind of device."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "stage"), [(name, one) for name, some in TRAINED.items() for one in some])
def test_a_stage_is_trained_there(child: ProcessPoolExecutor, recipe: str, stage: str) -> None:
    assert child.submit(trained_there, recipe, stage).result() == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", HOPS)
def test_a_hop_paints_there_and_hands_on_what_it_painted_on_the_cpu(
    child: ProcessPoolExecutor, name: str
) -> None:
    assert child.submit(painted_there, *HOPS[name]).result() == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "draft", "prior"])
def test_a_training_draws_its_grid_there(child: ProcessPoolExecutor, name: str) -> None:
    assert child.submit(drawn_there, name).result() == "cpu"


@pytest.mark.slow
def test_pictures_are_encoded_there(child: ProcessPoolExecutor) -> None:
    assert child.submit(encoded_there).result() == {"cpu"}


def test_what_was_left_behind_is_found(child: ProcessPoolExecutor) -> None:
    assert "device" in child.submit(mixed).result()


def mixed() -> str:
    """What is said of tensors of two devices."""
    with elsewhere() as there:
        weight = nn.Parameter(torch.ones(3, device=there))
        (weight * torch.tensor(2.0)).sum().backward()  # a number is no tensor that would have to be carried
        assert weight.grad is not None
        assert weight.grad.device == there
        try:
            weight + torch.ones(3)
        except Exception as error:  # noqa: BLE001
            return str(error)
    return "nothing"


@cache
def run_of(recipe: str) -> RunSpec:
    return run_spec(recipe)


@cache
def untrained(recipe: str, name: str) -> Stage:
    """A stage on the CPU, as at its beginning, but with all measured that it measures first."""
    spec = run_of(recipe).stage(name)
    stage = build_stage(spec.stage, parents(recipe, name))
    for part in stage.modules():
        if isinstance(part, Whitening):
            part.seen.fill_(part.measured)
        elif isinstance(part, CodePrior):
            part.products.fill_(1.0)
        elif isinstance(part, PriorDenoiser):
            part.counts.fill_(1)
    return stage


def known(recipe: str, name: str) -> Trained:
    """The same as its children see it."""
    return Trained(run_of(recipe).stage(name).stage, untrained(recipe, name).model.state_dict())


def parents(recipe: str, name: str) -> dict[str, Trained]:
    return {role: known(recipe, parent) for role, parent in run_of(recipe).stage(name).parents.items()}


def trained_there(recipe: str, name: str) -> set[str]:
    """A step of two forwards, as on a GPU; the devices on which a checkpoint's tensors should not be."""
    spec, pairs = run_of(recipe).stage(name), run_of(recipe).pairs
    assert pairs is not None
    stage = build_stage(spec.stage, parents(recipe, name))
    optimizer, budget = spec.optimizer.but(precision="bf16"), spec.budget.but(steps=1)
    with elsewhere() as there, imagined("cuda"):
        state = TrainState(stage.to(there), optimizer)
        here = nothing(spec, 2, pairs.context_length)
        batch = PairBatch(*(None if part is None else part.to(there) for part in here))
        (report,) = train(state, [batch, batch], optimizer=optimizer, budget=budget, accumulate=2)
        assert report.good
        report.read()
        return {tensor.device.type for tensor in state.tensors().values()} - {there.type}


def painted_there(recipe: str, name: str, changes: Changes, given: tuple[str, ...]) -> set[str]:
    """The kinds of devices of what a hop hands on."""
    run = run_of(recipe)
    stage = run.stage(name).stage
    (hop,) = (hop for hop in run.cascade.hops if hop.stage == name)
    beside = parents(recipe, name) | {role: known(recipe, guide) for role, guide in hop.guides.items()}
    beside.pop("start", None)
    how = hop.how.but(**{"num_steps": min(3, hop.how.num_steps)} | changes)
    state = told(run, stage, given)
    with elsewhere() as there:
        found = paint(load_hop(known(recipe, name), beside, device=there, precision="bf16"), state, how)
        return {part.device.type for part in found if isinstance(part, Tensor)}


def drawn_there(name: str) -> str:
    """The kind of device of a grid of pictures."""
    spec = run_of("smoke").stage(name)
    batch = nothing(spec, 2, run_of("smoke").pairs.context_length)
    batch = batch._replace(
        image=torch.zeros(2, 3, spec.stage.image_size, spec.stage.image_size, dtype=torch.uint8)
    )
    with elsewhere() as there, mock.patch.object(samples, "nearest", return_value=there):
        made = samples.drawn(known("smoke", name), parents("smoke", name), spec.samples, batch)
    assert made is not None
    return made.device.type


def encoded_there() -> set[str]:
    """The kinds of devices of the code of a picture, of its bits per dim, and of what a CLIP says of it."""
    picture, how = torch.zeros(2, 3, 64, 64), SamplingSpec(sampler="ddim", num_steps=2, guidance_scale=1.0)
    state = CascadeState([1, 2], torch.zeros(2, demo.CONTEXT, dtype=torch.long), label=torch.tensor([1, 2]))
    with elsewhere() as there:
        decoder = load_hop(known("unclip.small", "decoder"), parents("unclip.small", "decoder"), device=there)
        assert isinstance(decoder, Encoder)
        code = encode(decoder, state._replace(known=picture), how)
        chain = load_hop(known("improved_ddpm", "base"), {}, device=there)
        assert isinstance(chain, ChainHop)
        bits = bits_of(chain, picture, state, table_of(chain.spec, 4), variance="learned")
        clip = clip_of(known("smoke", "clip")).to(there)
        with mock.patch.object(torch, "inference_mode", torch.no_grad):  # in it the modes are passed by
            judge = reading(clip)
        found = (*code, *bits, judge.captions(["a star"]), judge.pictures(picture))
        return {part.device.type for part in found if isinstance(part, Tensor)}


def told(run: RunSpec, stage: Any, given: tuple[str, ...]) -> CascadeState:
    """What a hop is told of two images: the fields that are given, and a caption."""
    side, factor = stage.image_size, getattr(stage, "factor", 1)
    widths = [one.stage.net.embedding_width for one in run.stages if isinstance(one.stage, ClipSpec)]
    fields = {
        "image_embedding": torch.zeros(2, *widths),
        "image": torch.zeros(2, 3, side // factor, side // factor),
        "known": torch.zeros(2, 3, side, side),
        "hole": torch.ones(2, 1, side, side, dtype=torch.bool),
        "reference": torch.zeros(2, 3, side, side),
        "gray": torch.zeros(2, 1, side, side),
        "coarse": torch.zeros(2, 3, side // 4, side // 4),
        "label": torch.tensor([1, 2]),
    }
    state = requested(["a star", "two stars"], [1, 2], run.pairs.context_length)
    return state._replace(**{name: fields[name] for name in given})
