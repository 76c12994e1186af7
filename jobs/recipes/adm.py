"""ADM on ImageNet at 256 px, with classifier guidance, as published.

Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), tables 11, 12 and 14, and the published code.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.layouts.published import published
from dd_core.nets.network import PlainSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.classifier import ClassifierSpec
from dd_core.stages.published import stage_of
from dd_core.steering import GradientSpec
from jobs.recipes._hardware import PAPER_WORKERS, gpus_80gb
from jobs.recipes.glide import paper_stage
from workflows.labels import LabelSpec
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import TrainSpec

CLASSES = LabelSpec(path="label", classes=tuple(str(number) for number in range(1000)))
"""The json beside an image has its class, 0 to 999, under `label`."""


def run() -> RunSpec:
    """554 M weights and a classifier of 54 M, for tars of ImageNet: set pairs.shards and pairs.destination.

    Hardware: 8 GPUs of 80 GB (`_hardware.py`).  Time, an estimate and not measured: an H100 each, 40 % of its
    989 TFLOP/s, operations of a sample x batch x steps (tests/benchmarks/recipe_flops.py):
    base: 6,718 GFLOP x 256 x 1,980,000 = 12.5 days
    classifier: 439 GFLOP x 256 x 500,000 = 0.2 days
    Published: 916 V100-days for the base and 46 for the classifier (table 10).

    Departures: bf16 for fp16; no mirroring (published: half of the images); the classifier sees centre crops
    (published: random crops of 80 to 100 %), its learning rate follows half a cosine (published: linear) and
    its weights are averaged over 10,000 images (published: not); gradients are clipped at norm 1; the EMA of
    the base spans a tenth of the run so far until it spans 10,000 steps (published: these from the first).
    """
    how = SamplingSpec(
        sampler="ddpm",
        num_steps=250,
        spacing="linspace",
        guidance_scale=1.0,
        gradient=GradientSpec(classes=1.0),
    )
    guides = {"classifier": "classifier"}
    hop = HopSpec(stage="base", how=how, guides=guides, follows_request=True)
    return RunSpec(
        name="adm",
        pairs=PairsSpec(shards=("imagenet/*.tar",), destination="prepared", sizes=(256,)),
        stages=(base(), classifier()),
        cascade=CascadeSpec(name="adm", hops=(hop,), context_length=32, image_size=256),
    )


def base() -> TrainSpec:
    """The class-conditional model: linear schedule, learned variance, batch 256, 1e-4, 1.98 M steps."""
    net = published()["adm-imagenet256"].net
    assert isinstance(net, PlainSpec)
    stage = ChainSpec(net=net, image_size=256, schedule=ScheduleSpec(), loss="hybrid", told_dropout=0.0)
    return paper_stage("base", stage, 1_980_000, 256, label=CLASSES)


def classifier() -> TrainSpec:
    """Depth 2, width 128, timesteps drawn uniformly; batch 256, 3e-4, weight decay .05, 500,000 steps."""
    stage = stage_of(published()["adm-classifier256"])
    assert isinstance(stage, ClassifierSpec)
    return TrainSpec(
        name="classifier",
        stage=stage,
        label=CLASSES,
        optimizer=OptimizerSpec(learning_rate=3e-4, weight_decay=0.05, warmup_steps=0, betas=(0.9, 0.999)),
        budget=Budget(steps=500_000, checkpoint_every=1_000, report_every=100),
        batch_size=256,
        **gpus_80gb(PAPER_WORKERS),
    )
