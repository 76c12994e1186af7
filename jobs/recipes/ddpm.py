"""DDPM on the embedded world: linear schedule, ancestral sampling, unconditional.

It predicts the image, which DDPM tried first (section 3.2); with `--set stages.base.stage.predicts=eps` it
predicts the noise, as published.

It paints shapes of its own choosing: the oracle can recognise a scene but has no caption to check, so judge
by eye.
Source: Ho et al. 2020 (arXiv:2006.11239); sizes are ours.
"""

from typing import Literal

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.text import CaptionedSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.chain_spec import ChainSpec
from jobs.recipes import demo
from jobs.recipes._hardware import any_node
from workflows.evaluation_spec import EvaluationSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

WORKER = any_node(memory_gib=3)

OPTIMIZER = OptimizerSpec(algorithm="muon_unet", learning_rate=3e-3, ema_images=3_000)
BUDGET = Budget(steps=1_000, checkpoint_every=500, report_every=25, sample_every=500)
BATCH = 16
"""Small: on few images, more steps learn more (4,800 images: error .24 in batches of 16, .37 in 32)."""
UNET = UNetSpec(
    width=64,
    channel_mult=(1, 2),
    blocks_per_level=2,
    attention_at=(8,),
    groups=16,
    stem="unshuffle",
    stem_factor=4,
    level_scale=1.0,
)
"""Told timesteps; the stem folds 64 px by 4 to 16 x 16 positions."""
PREDICTS: Literal["x0"] = "x0"
"""All systems at this size predict the image: to predict the noise, as published, a network has to pass on
every pixel's noise to the last bit before a picture shows, which 20,000 images do not teach it (README's
log)."""
ANCESTRAL = SamplingSpec(
    sampler="ddpm", variance="fixed_small", num_steps=100, spacing="linspace", guidance_scale=1.0
)
"""With the small fixed variance."""


def run() -> RunSpec:
    """DDPM, unconditional, on the demo's pairs.  Two CPUs, no GPU, up to 8 GB."""
    before = demo.run()
    return RunSpec(
        name="ddpm",
        shapes=before.shapes,
        pairs=before.pairs,
        stages=(base(),),
        cascade=CascadeSpec(
            name="ddpm",
            hops=(HopSpec(stage="base", how=ANCESTRAL, follows_request=True),),
            context_length=demo.CONTEXT,
            image_size=64,
        ),
        evaluation=EvaluationSpec(captions=16),
    )


def base() -> TrainSpec:
    """64 px, T = 1000, the simple loss; sampled in 100 steps with the small fixed variance."""
    stage = ChainSpec(
        net=PlainSpec(unet=UNET),
        schedule=ScheduleSpec(betas="linear", num_timesteps=1000),
        predicts=PREDICTS,
        told_dropout=0.0,
    )
    return TrainSpec(
        name="base",
        stage=stage,
        optimizer=OPTIMIZER,
        budget=BUDGET,
        batch_size=BATCH,
        **WORKER,
        samples=SamplesSpec(prompts=("", "", "", ""), how=ANCESTRAL.but(num_steps=50)),
    )


def filling(before: TrainSpec, name: str = "filling") -> TrainSpec:
    """A chain finetuned from `before` to fill holes: also told the known part of the picture, and its mask.

    A chain that enlarges is still shown the whole small picture.
    Source: Nichol et al. 2022 (arXiv:2112.10741, GLIDE), sections 2.3 and 4.2.
    """
    assert isinstance(before.stage, ChainSpec)
    assert isinstance(before.stage.net, PlainSpec | CaptionedSpec)
    net, told = before.stage.net, before.stage.channels + 1
    net = net.but(unet=net.unet.but(image_channels=net.unet.image_channels + told))
    parents = before.parents | {"start": before.name}
    return before.but(name=name, stage=before.stage.but(net=net, inpaints=True), parents=parents)
