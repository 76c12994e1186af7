"""While it samples, the host hands the device work and waits for nothing: no copy between them at a step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dd_core.cascade import drawn
from dd_core.denoiser import Conditioning, Denoised, Denoiser
from dd_core.guidance import Answers, Rows, answering, stack
from dd_core.samplers import Query, Sampling, SamplingSpec, begin
from dd_core.stages import load_hop
from dd_core.stages.chain_hop import ChainHop, levels_of
from dd_core.steering import GradientSpec
from tests.unit.dd_core.test_chain import GLIDE, trained
from tests.unit.dd_core.test_guides import PARENTS, asked

AWAY = torch.device("meta")
"""Stands for a GPU: values that are there cannot be read here."""
EVERY = GradientSpec(classes=1.0, caption=2.0, image=0.5, style=50.0, structure=3.0)
HOWS = {
    "plain": SamplingSpec(guidance_scale=1.0),
    "guided": SamplingSpec(guidance_scale=3.0),
    "rescaled": SamplingSpec(guidance_scale=3.0, guidance_rescale=0.7),
    "at some levels": SamplingSpec(guidance_scale=3.0, guidance_interval=(0.3, 5.0)),
    "threshold": SamplingSpec(guidance_scale=3.0, dynamic_threshold=0.9),
    "led": SamplingSpec(guidance_scale=1.0, gradient=EVERY),
}


class Crossings(TorchDispatchMode):
    """What is copied from the host to AWAY, or made there of numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        here = {one.device for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim}
        there = {one.device for one in tree_leaves(out) if isinstance(one, Tensor)}
        if len(here | there) > 1 or ("lift_fresh" in str(func) and AWAY in there):
            self.found.append(f"{func}: {here} -> {there}")
        return out


def away(part: Any) -> Any:
    """The same where values cannot be read."""
    return part.to(AWAY) if isinstance(part, Tensor | nn.Module) else part


def painter() -> ChainHop:
    made = load_hop(trained(GLIDE), PARENTS, device="cpu")
    assert isinstance(made, ChainHop)
    return made


@torch.no_grad()
def crossings(sampling: Sampling, answers: Answers) -> list[list[str]]:
    """What crosses at each query of a sampling."""
    found, seen = list[list[str]](), Crossings()
    try:
        query = next(sampling)
        while True:
            with (seen := Crossings()):
                query = sampling.send(answers([query])[0])
            found.append(seen.found)
    except StopIteration:
        return [*found, seen.found]


def nothing_drawn(like: Tensor) -> Tensor:
    raise AssertionError("noise was drawn, which is the host's on purpose")


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_nothing_crosses_in_a_deterministic_sampler(sampler: Any) -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(x / (1 + sigma[:, None] ** 2))

    how, told = SamplingSpec(sampler=sampler, guidance_scale=1.0), Conditioning()
    sampling = begin(how, torch.empty(2, 3, device=AWAY), levels_of(GLIDE, how), nothing_drawn)
    found = crossings(sampling, answering(lambda _: denoise, [Rows(told, told, torch.ones(2))]))
    assert found == [[]] * (39 if sampler == "heun" else 20)


@pytest.mark.parametrize("name", HOWS)
def test_nothing_crosses_to_the_device_but_what_a_request_says_once(name: str) -> None:
    """At the first query, and where guidance begins or ends, its rows are carried; a value is never read."""
    how = HOWS[name].but(sampler="ddim", num_steps=2 if name == "led" else 4)
    hop, levels = painter(), levels_of(GLIDE, how)
    rows = hop.rows(asked(4, 9), how)
    for part in (hop.model, *hop.leaders):
        away(part)
    cond, null = (Conditioning(*map(away, told)) for told in (rows.cond, rows.null))
    answers = answering(hop.denoiser, [rows._replace(cond=cond, null=null)])
    sampling = begin(how, torch.empty(hop.shape(2), device=AWAY), levels, nothing_drawn)
    busy = [place for place, crossed in enumerate(crossings(sampling, answers)) if crossed]
    guided = [
        low < level <= high for level in levels[:-1] for low, high in [how.guidance_interval or (0, 99)]
    ]
    turns = [place for place in range(1, len(guided)) if guided[place] != guided[place - 1]]
    assert busy == [0, *turns]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose driver tells who waits")
@pytest.mark.parametrize("name", HOWS)
def test_cuda_is_never_waited_for_in_a_ddim_sampling(name: str) -> None:
    how = HOWS[name].but(sampler="ddim", num_steps=6)
    hop = load_hop(trained(GLIDE), PARENTS, device="cuda")
    expected = drawn(hop.denoiser, hop.start(asked(4, 9), how))  # and every kernel has been chosen
    draw = hop.start(asked(4, 9), how)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = drawn(hop.denoiser, draw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected)


def test_the_interval_is_decided_by_the_number_that_the_sampler_says() -> None:
    """As by a tensor of it, for one request and for several, and its denoiser is made at the turns alone."""
    hop, how = painter(), HOWS["at some levels"]
    parts = [hop.rows(asked(4), how), hop.rows(asked(9), HOWS["guided"])]
    made: list[Tensor] = []

    def make(rows: Rows) -> Denoiser:
        made.append(rows.scale)
        return hop.denoiser(rows)

    answers = answering(make, parts)
    x = torch.randn(2, 1, 3, 16, 16)
    for levels in ((9.0, 0.1), (5.1, 0.1), (5.0, 0.1), (1.0, 0.1), (0.3, 0.1)):
        found = answers([Query(one, level) for one, level in zip(x, levels, strict=True)])
        together = hop.denoiser(stack(parts))(x.flatten(0, 1), torch.tensor(levels)).x0
        torch.testing.assert_close(torch.cat([one.x0 for one in found]), together, rtol=0, atol=0)
    assert [scale.tolist() for scale in made] == [[1.0, 3.0], [3.0, 3.0], [1.0, 3.0]]
