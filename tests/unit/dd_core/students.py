"""Small consistency models, what they stand on, and pictures to learn."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dd_core.consistency import FixedLevels, GrowingLevels
from dd_core.nets.network import PlainSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import OptimizerSpec, PairBatch, Trained
from dd_core.stages import build_stage
from dd_core.stages.base import BaseSpec
from dd_core.stages.consistency import ConsistencyStage
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from dd_core.text import tokens
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.test_stages import CLIP

BASE = BaseSpec(net=chains.TRANSFORMER.net.but(embedding_width=8), image_size=16, sigma_min=0.1)
SPEC = ConsistencySpec(base=BASE, teacher=TeacherSpec(guidance_scale=2.0), levels=FixedLevels(num_levels=8))
ALONE = SPEC.but(teacher=None, levels=GrowingLevels(steps=10, s1=20))
UNET = chains.UNET.but(attention_at=(), attention_in_middle=False)
EDM = chains.EDM.but(net=PlainSpec(unet=UNET.but(labels=2, dropout=0.1)))
"""The published teacher, small: told one of two classes."""
TIMED = EDM.but(schedule=ScheduleSpec(), predicts="v")
JUMPING = ConsistencySpec(
    base=EDM.but(net=PlainSpec(unet=UNET.but(labels=2))),
    teacher=TeacherSpec(guidance_scale=1.0),
    levels=FixedLevels(num_levels=8, mu=0.9),
)
"""The published student, small: without dropout."""
OPTIMIZER = OptimizerSpec(learning_rate=3e-3, precision="fp32", warmup_steps=5, ema_images=300)
JUMPS = SamplingSpec(sampler="consistency", num_steps=2, guidance_scale=1.0)


def told(*captions: str) -> Tensor:
    return torch.tensor(tokens(captions, 12))


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """No weight left at zero, so that everything that is told may matter."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.state_dict()


def on_a_base() -> dict[str, Trained]:
    """What SPEC stands on: a CLIP and its base, of random weights."""
    torch.manual_seed(0)
    clip = Trained(CLIP, random_weights(build_stage(CLIP, {}).model))
    return {"clip": clip, "base": Trained(BASE, random_weights(build_stage(BASE, {"clip": clip}).model))}


def on_classes() -> dict[str, Trained]:
    """What JUMPING stands on."""
    torch.manual_seed(2)
    return {"base": Trained(EDM, random_weights(build_stage(EDM, {}).model))}


def made(spec: ConsistencySpec, parents: dict[str, Trained]) -> ConsistencyStage:
    torch.manual_seed(1)
    stage = build_stage(spec, parents)
    assert isinstance(stage, ConsistencyStage)
    return stage


def squares(count: int = 8) -> Iterator[PairBatch]:
    """A red or a blue square somewhere on grey, its caption, and its class."""
    generator = torch.Generator().manual_seed(0)
    captions = told("a red square", "a blue square")
    while True:
        blue = torch.randint(0, 2, (count,), generator=generator)
        image = torch.full((count, 3, 16, 16), 60, dtype=torch.uint8)
        for place, (y, x) in enumerate(torch.randint(0, 9, (count, 2), generator=generator).tolist()):
            image[place, 2 * int(blue[place]), y : y + 8, x : x + 8] = 240
        yield PairBatch(image, captions[blue], blue)
