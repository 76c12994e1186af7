"""Guidance by gradient on the embedded world: an unconditional base, guided by a noised CLIP.

`classes` guides the same base by a noised classifier.  The base is never told a caption or a class: whatever
comes out right is the guide's work.
Sources: Dhariwal & Nichol 2021 (arXiv:2105.05233), Nichol et al. 2022 (arXiv:2112.10741), Liu et al. 2021
(arXiv:2112.05744); sizes are ours.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.classifier import ClassifierSpec as ClassifierNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNetSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.classifier import ClassifierSpec
from dd_core.steering import GradientSpec
from jobs.recipes import ddpm, demo
from jobs.recipes._hardware import any_node
from jobs.recipes.improved_ddpm import LABEL
from workflows.evaluation_spec import EvaluationSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

COSINE = ScheduleSpec(betas="cosine", num_timesteps=1000)
"""Of the base, and so the levels at which its guides train: one timestep in 25 lies above sigma 16."""
WORKER = any_node(memory_gib=3)


def run() -> RunSpec:
    """The demo's pairs and CLIP, noised CLIP, base; 64 captions judged.  Two CPUs, no GPU, up to 8 GB."""
    led = ddpm.ANCESTRAL.but(gradient=GradientSpec(caption=3.0))
    guides = {"noised_clip": "noised_clip", "clip": "clip"}
    return ddpm.run().but(
        name="guided",
        stages=(demo.clip(), noised_clip(), base()),
        cascade=cascade("guided", HopSpec(stage="base", how=led, guides=guides, follows_request=True)),
        evaluation=EvaluationSpec(captions=64),
    )


def classes() -> RunSpec:
    """An unconditional base guided to classes: `ddiff sample --label 4` asks for something purple.

    Two CPUs, no GPU, up to 8 GB.
    """
    led = ddpm.ANCESTRAL.but(gradient=GradientSpec(classes=3.0))
    guides = {"classifier": "classifier"}
    hop = HopSpec(stage="base", how=led, guides=guides, follows_request=True)
    return ddpm.run().but(
        name="guided_classes",
        stages=(classifier(), base()),
        cascade=cascade("guided_classes", hop),
        evaluation=EvaluationSpec(captions=4),
    )


def base() -> TrainSpec:
    """64 px, cosine schedule, learned variance, unconditional."""
    stage = ChainSpec(
        net=PlainSpec(unet=ddpm.UNET, out_channels=6),
        schedule=COSINE,
        loss="hybrid",
        predicts=ddpm.PREDICTS,
        told_dropout=0.0,
    )
    return TrainSpec(
        name="base",
        stage=stage,
        optimizer=ddpm.OPTIMIZER,
        budget=ddpm.BUDGET.but(steps=3_000),
        batch_size=ddpm.BATCH,
        **WORKER,
        samples=SamplesSpec(prompts=("",) * 4, how=ddpm.ANCESTRAL.but(num_steps=50)),
    )


def noised_clip() -> TrainSpec:
    """The demo's noised CLIP, trained at the noise levels of the base."""
    before = demo.noised_clip()
    return before.but(stage=before.stage.but(schedule=COSINE))


def classifier() -> TrainSpec:
    """Noisy 64 px -> the colour of the first thing; told the timesteps of the base."""
    unet = UNetSpec(
        width=32,
        channel_mult=(1, 2, 3, 4),
        blocks_per_level=1,
        attention_at=(8,),
        head_width=32,
        groups=16,
        level_scale=1.0,
    )
    net = ClassifierNetSpec(unet=unet, image_size=64, classes=len(LABEL.classes))
    return TrainSpec(
        name="classifier",
        stage=ClassifierSpec(net=net, schedule=COSINE),
        label=LABEL,
        optimizer=OptimizerSpec(learning_rate=1e-3, weight_decay=0.05),
        budget=Budget(steps=600, checkpoint_every=300, report_every=25),
        batch_size=ddpm.BATCH,
        **WORKER,
    )


def cascade(name: str, hop: HopSpec) -> CascadeSpec:
    """One hop at 64 px."""
    return CascadeSpec(name=name, hops=(hop,), context_length=demo.CONTEXT, image_size=64)
