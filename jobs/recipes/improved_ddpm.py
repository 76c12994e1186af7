"""Improved DDPM on the embedded world: cosine schedule of 4000 timesteps, learned variance, classes.

`bound` trains the same network on the variational bound; importance sampling of timesteps would begin when
each of them has ten losses, which takes more steps.  `inpainting` finetunes it to fill holes.  The class is
the colour of the first thing in a scene: `ddiff sample --label 4` paints something purple.
Source: Nichol & Dhariwal 2021 (arXiv:2102.09672); sizes are ours.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.network import PlainSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stages.chain_spec import ChainSpec
from jobs.recipes import ddpm, demo
from jobs.recipes._hardware import any_node
from workflows.evaluation_spec import EvaluationSpec
from workflows.labels import LabelSpec
from workflows.run_spec import RunSpec
from workflows.shapes import COLOURS
from workflows.train_spec import SamplesSpec, TrainSpec

WORKER = any_node(memory_gib=3)

LABEL = LabelSpec(path="objects.0.colour", classes=tuple(COLOURS))
SAMPLED = ddpm.ANCESTRAL.but(guidance_scale=3.0)
LEARNED = SAMPLED.but(variance="analytic")
"""By the variance that it learns: for a network that predicts the image its error, in steps of any length
(`dd_core.denoiser.learned_error`)."""


def run() -> RunSpec:
    """Cosine betas, learned variance, classes, on the demo's pairs.  Two CPUs, no GPU, up to 8 GB."""
    whole = ddpm.run()
    return whole.but(
        name="improved_ddpm",
        stages=(base(),),
        cascade=CascadeSpec(
            name="improved_ddpm",
            hops=(HopSpec(stage="base", how=LEARNED, follows_request=True),),
            context_length=demo.CONTEXT,
            image_size=64,
        ),
        evaluation=EvaluationSpec(captions=16),
    )


def base() -> TrainSpec:
    """64 px, the hybrid loss; a tenth of the labels dropped, for classifier-free guidance."""
    unet = ddpm.UNET.but(labels=len(LABEL.classes) + 1)
    stage = ChainSpec(
        net=PlainSpec(unet=unet, out_channels=6),
        schedule=ScheduleSpec(betas="cosine", num_timesteps=4000),
        rescaled_time=True,
        predicts=ddpm.PREDICTS,
        loss="hybrid",
        told_dropout=0.1,
    )
    return TrainSpec(
        name="base",
        stage=stage,
        label=LABEL,
        optimizer=ddpm.OPTIMIZER,
        budget=ddpm.BUDGET.but(steps=3_000),
        batch_size=ddpm.BATCH,
        **WORKER,
        samples=SamplesSpec(prompts=("",) * len(LABEL.classes), how=LEARNED.but(num_steps=50)),
    )


def bound() -> RunSpec:
    """The same network trained on L_vlb, for likelihoods.  Two CPUs, no GPU, up to 8 GB.

    It predicts the noise, as published: the bound counts the error of a predicted image thousands of times at
    the lowest levels.
    """
    whole, trained = run(), base()
    assert isinstance(trained.stage, ChainSpec)
    by_bound = trained.but(
        stage=trained.stage.but(loss="vlb", predicts="eps"),
        budget=ddpm.BUDGET,
        samples=trained.samples.but(how=SAMPLED.but(num_steps=50)),
    )
    hop = HopSpec(stage="base", how=SAMPLED, follows_request=True)
    cascaded = whole.cascade.but(name="improved_ddpm_bound", hops=(hop,))
    return whole.but(name="improved_ddpm_bound", stages=(by_bound,), cascade=cascaded)


def inpainting() -> RunSpec:
    """`run`, and its base finetuned to fill holes with a thing of the colour asked for.

    Two CPUs, no GPU, up to 8 GB.
    """
    whole = run()
    hop = HopSpec(stage="filling", how=SAMPLED, follows_request=True)
    return whole.but(stages=(*whole.stages, filling(base())), cascade=whole.cascade.but(hops=(hop,)))


def filling(before: TrainSpec) -> TrainSpec:
    """The base finetuned to fill holes, at a third of its rate."""
    return ddpm.filling(before).but(
        optimizer=ddpm.OPTIMIZER.but(learning_rate=1e-3), budget=ddpm.BUDGET.but(steps=1_500)
    )
