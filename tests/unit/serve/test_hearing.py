"""Classes, effort and steps: what reaches the hops, and what is refused because none can take it."""

import io
from typing import Any

import pytest
import torch
from PIL import Image

from dd_core.cascade import HopSpec
from dd_core.consistency import FixedLevels
from dd_core.nets.network import PlainSpec
from dd_core.samplers import SamplingSpec
from dd_core.stages import StageSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.steering import GradientSpec
from jobs.recipes import consistency, ddpm, guided
from serve.admission import Door
from serve.engine import RefusedError
from serve.files import Files
from serve.guard import Limits
from serve.ingress import Api
from serve.openai_api import EFFORT, GenerationRequest
from serve.painter import Order, Painter, chosen
from tests.unit.serve.endpoint import BASE, CASCADE, DIGEST, LAST, URL, Served, pngs, refused


def test_a_negative_prompt_is_refused_where_what_is_guided_reads_no_captions() -> None:
    stages = {hop.stage: CHAIN for hop in CASCADE.hops}  # told classes alone
    with Served(stages=stages).client as client:
        body = {"prompt": "a", "negative_prompt": "b", "guidance_scale": 3}
        told = refused(client.post(URL, json=body), 400, "negative_prompt")
    assert told == "negative_prompt: no hop is guided away from it; leave it out"


def test_a_class_reaches_every_hop_and_the_file_and_is_refused_where_none_hears_it(served: Served) -> None:
    assert "label: must be left out: no hop is told classes" in refused(served.post(label=2), 400, "label")
    one = Served(by_class=True)
    with one.client:
        answer = one.post(label=2, seed=1)
        (file,) = pngs(answer)
        assert Image.open(io.BytesIO(file)).text["label"] == "2"
        assert [link.labels for link in one.links.values()] == [[torch.tensor([2])]] * 2
        one.links["base"].failing = RefusedError("it paints by class; give a label")
        assert refused(one.post(), 400, "label") == "it paints by class; give a label"
        refused(one.post(label=-1), 400, "label")


@pytest.mark.parametrize(
    ("own", "quality", "steps"),
    [(100, "max", 250), (100, "low", 50), (1000, "auto", 1000), (1000, "high", 1000), (1000, "low", 500)],
)
def test_effort_asks_for_no_more_steps_than_a_request_may_and_cuts_none_of_a_hop_s_own(
    own: int, quality: Any, steps: int
) -> None:
    painter = Painter(CASCADE, DIGEST, {}, precision="auto")
    order = Api(painter, created=0, door=Door(1), limits=Limits(1, 1, 1), files=Files("memory://")).order(
        GenerationRequest(prompt="a", quality=quality)
    )
    hop = HopSpec(stage="base", how=BASE.but(num_steps=own), follows_request=True)
    assert chosen(hop, order).num_steps == steps


CHAIN = ChainSpec(net=PlainSpec(unet=ddpm.UNET.but(labels=4)), told_dropout=0.1)


@pytest.mark.parametrize(
    ("how", "quality", "steps"),
    [
        ({"spacing": "ldm_plus_one", "num_steps": 50}, "xhigh", 125),  # 150 divides no 1000
        ({"spacing": "ldm_plus_one", "num_steps": 50}, "low", 25),
        ({"spacing": "ddim_leading", "num_steps": 25}, "xhigh", 77),
        ({"spacing": "karras", "num_steps": 25}, "xhigh", 75),
    ],
)
def test_effort_is_rounded_to_steps_that_the_hop_can_take(
    how: dict[str, Any], quality: Any, steps: int
) -> None:
    hop = HopSpec(stage="base", how=SamplingSpec(sampler="ddim", **how), follows_request=True)
    order = Order("a", "", [0], None, EFFORT[quality], None)
    assert chosen(hop, order, CHAIN).num_steps == steps


def test_effort_is_rounded_to_the_jumps_of_a_path_in_segments() -> None:
    jumping = consistency.classes()
    (hop,) = jumping.cascade.hops
    stage = jumping.stage(hop.stage).stage
    assert isinstance(stage, ConsistencySpec)
    stage = stage.but(levels=FixedLevels(num_levels=17))
    efforts = (0.5, 1, 2, 3, 4)
    found = [chosen(hop, Order("a", "", [0], None, effort, None), stage).num_steps for effort in efforts]
    assert found == [4, 4, 8, 16, 16]


def test_steps_that_a_hop_cannot_take_are_refused_before_any_hop_is_asked() -> None:
    how = SamplingSpec(sampler="ddim", spacing="ldm_plus_one", num_steps=50)
    hops = (HopSpec(stage="upsampler", how=LAST), HopSpec(stage="base", how=how, follows_request=True))
    one = Served(cascade=CASCADE.but(hops=hops), stages={"base": CHAIN})
    with one.client:
        told = refused(one.post(num_inference_steps=30), 400, "num_inference_steps")
        assert told == "hop base: ldm_plus_one needs num_steps below 1000 that divides it, got 30"
        assert [link.hows for link in one.links.values()] == [[], []]


UNTOLD = ChainSpec(net=PlainSpec(unet=ddpm.UNET), told_dropout=0.0)


def test_a_guidance_that_a_hop_has_not_learned_is_refused_by_its_name() -> None:
    one = Served(stages={hop.stage: UNTOLD for hop in CASCADE.hops})
    with one.client:
        assert "told_dropout" in refused(one.post(guidance_scale=3), 400, "guidance_scale")
        assert [link.hows for link in one.links.values()] == [[], []]


BY_CLASS = ChainSpec(
    net=PlainSpec(unet=ddpm.UNET.but(labels=4, image_channels=3)), image_size=256, factor=4, told_dropout=0.0
)

LED = CASCADE.hops[1].but(
    how=LAST.but(gradient=GradientSpec(classes=2.0)), guides={"classifier": "classifier"}
)


@pytest.mark.parametrize(
    ("second", "stages", "lacking", "unknown"),
    [
        (
            CASCADE.hops[1],
            {"upsampler": BY_CLASS},
            "hop upsampler: it paints by class, and the request names none; give a label",
            "hop upsampler: label [8]: classes are 0 to 3",
        ),
        (
            LED,
            {"upsampler": UNTOLD, "classifier": guided.classifier().stage},
            "hop upsampler: it paints by class, and the request names none; give a label",
            "hop upsampler: label [8] is no class of the classifier; there are 0 to 7",
        ),
    ],
    ids=["told", "led"],
)
def test_a_class_that_a_later_hop_lacks_or_does_not_know_is_refused_before_any_hop_is_asked(
    second: HopSpec, stages: dict[str, StageSpec], lacking: str, unknown: str
) -> None:
    cascade = CASCADE.but(hops=(CASCADE.hops[0], second))
    one = Served(cascade=cascade, by_class=True, stages=stages | {"base": UNTOLD})
    with one.client:
        assert refused(one.post(), 400, "label") == lacking
        assert refused(one.post(label=8), 400, "label") == unknown
        assert [link.hows for link in one.links.values()] == [[], []]
        assert len(pngs(one.post(label=3))) == 1


def test_quality_is_refused_where_steps_are_fixed() -> None:
    how = SamplingSpec(sampler="ddim", spacing="fast27", num_steps=27)
    hops = (HopSpec(stage="base", how=how, follows_request=True), CASCADE.hops[1])
    one = Served(cascade=CASCADE.but(hops=hops), stages={"base": CHAIN})
    with one.client:
        told = refused(one.post(quality="high"), 400, "quality")
        assert told == "quality: no hop takes any other number of steps; leave it out"
