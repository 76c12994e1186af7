"""GLIDE: a text transformer trained with the model, classifier-free guidance, an upsampler.

`run` is the system at the size of the demo, `clip_guided` the same guided by a noised CLIP, `paper` the
published one; `inpainting` and `paper_inpainting` finetune both their models to fill holes, with four more
input channels that begin at zero.
Source: Nichol et al. 2022 (arXiv:2112.10741).
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.layouts.published import published
from dd_core.nets.text import CaptionedSpec, TextSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.steering import GradientSpec
from jobs.recipes import ddpm, demo
from jobs.recipes._hardware import PAPER_WORKERS, any_node, gpus_80gb
from workflows.evaluation_spec import EvaluationSpec
from workflows.labels import LabelSpec
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

WORKER = any_node(memory_gib=3)

ANCESTRAL = SamplingSpec(sampler="ddpm", num_steps=100, spacing="linspace", guidance_scale=3.0)
SMALL = ANCESTRAL.but(variance=ddpm.ANCESTRAL.variance)
FAST27 = SamplingSpec(sampler="ddim", num_steps=27, spacing="fast27", guidance_scale=1.0, temperature=0.997)
COSINE, LINEAR = ScheduleSpec(betas="cosine"), ScheduleSpec()

WORDS = TextSpec(
    width=demo.TOWERS.text_width,
    layers=demo.TOWERS.text_layers,
    heads=demo.TOWERS.text_width // demo.TOWERS.head_width,
    context_length=demo.CONTEXT,
    vocab_size=demo.TOWERS.vocab_size,
)
"""A text transformer that can begin as the text tower of the demo's CLIP."""


def run() -> RunSpec:
    """The demo's pairs; CLIP, base, its finetuning for guidance, upsampler.  Two CPUs, no GPU, up to 8 GB."""
    return ddpm.run().but(
        name="glide",
        stages=(demo.clip(), base(), guided(), upsampler()),
        cascade=cascade(demo.CONTEXT, SMALL),
        evaluation=demo.run().evaluation,
    )


def cascade(context_length: int, how: SamplingSpec) -> CascadeSpec:
    """Base and upsampler, the latter sampled as published."""
    return CascadeSpec(
        name="glide",
        hops=(
            HopSpec(stage="guided", how=how, follows_request=True),
            HopSpec(stage="upsampler", how=FAST27),
        ),
        context_length=context_length,
        image_size=256,
    )


def base() -> TrainSpec:
    """64 px, hybrid loss, captions never dropped.  It departs from the published model twice.

    Betas are linear, not cosine: in pictures as plain as these all is to be seen below a noise level of 10,
    so that captions are needed above it only.  There are 6 % of cosine's timesteps, and of 96,000 captions it
    learned nothing; of linear betas it is a third.

    Its text transformer begins as the text tower of the run's CLIP and stays so: from 48,000 pictures one
    that begins with nothing learned the words for backgrounds, and one that begins as CLIP's and is trained
    forgot most of what it knew.
    """
    net = CaptionedSpec(unet=ddpm.UNET.but(text_width=WORDS.width), text=WORDS)
    stage = ChainSpec(net=net, schedule=LINEAR, predicts=ddpm.PREDICTS, loss="hybrid", told_dropout=0.0)
    return TrainSpec(
        name="base",
        stage=stage.but(text_frozen=True),
        parents={"start": "clip"},
        optimizer=ddpm.OPTIMIZER,
        budget=ddpm.BUDGET.but(steps=3_000),
        batch_size=ddpm.BATCH,
        **WORKER,
        samples=SamplesSpec(prompts=demo.PROMPTS, how=SMALL.but(num_steps=50, guidance_scale=1.0)),
    )


def guided() -> TrainSpec:
    """The base finetuned with a fifth of the captions dropped, for classifier-free guidance."""
    before = base()
    return before.but(
        name="guided",
        stage=before.stage.but(told_dropout=0.2),
        parents={"start": "base"},
        optimizer=ddpm.OPTIMIZER.but(learning_rate=3e-4),
        budget=ddpm.BUDGET.but(steps=600, checkpoint_every=300, sample_every=300),
        samples=SamplesSpec(prompts=demo.PROMPTS, how=SMALL.but(num_steps=50)),
    )


def clip_guided() -> RunSpec:
    """GLIDE's base before it is finetuned, guided by a noised CLIP instead (section 2.4).

    Two CPUs, no GPU, up to 8 GB.
    """
    whole = run()
    led = SMALL.but(guidance_scale=1.0, gradient=GradientSpec(caption=10.0))
    guides = {"noised_clip": "noised_clip", "clip": "clip"}
    hop = HopSpec(stage="base", how=led, guides=guides, follows_request=True)
    return whole.but(
        name="glide_clip_guided",
        stages=(demo.clip(), base(), noised_clip(), upsampler()),
        cascade=whole.cascade.but(name="glide_clip_guided", hops=(hop, whole.cascade.hops[1])),
        evaluation=EvaluationSpec(captions=64),
    )


def noised_clip() -> TrainSpec:
    """The demo's noised CLIP, trained at the noise levels of the base."""
    before = demo.noised_clip()
    return before.but(stage=before.stage.but(schedule=LINEAR))


def inpainting() -> RunSpec:
    """`run`, and both its models finetuned to fill holes by caption.  Two CPUs, no GPU, up to 8 GB."""
    whole = run()
    hops = (
        HopSpec(stage="filling", how=SMALL, follows_request=True),
        HopSpec(stage="filling_upsampler", how=FAST27),
    )
    return whole.but(
        name="glide_inpainting",
        stages=(*whole.stages, ddpm.filling(guided()), filling_upsampler(upsampler())),
        cascade=whole.cascade.but(name="glide_inpainting", hops=hops),
    )


def filling_upsampler(before: TrainSpec) -> TrainSpec:
    """The upsampler finetuned to enlarge into holes, at a third of its rate."""
    tuned = ddpm.filling(before, "filling_upsampler")
    return tuned.but(optimizer=ddpm.OPTIMIZER.but(learning_rate=1e-3))


def upsampler() -> TrainSpec:
    """64 -> 256 px, linear schedule, told the caption and the small picture; 27 steps."""
    unet = ddpm.UNET.but(
        width=32,
        channel_mult=(1, 2),
        attention_at=(),
        stem_factor=8,
        text_width=64,
        image_channels=3,
        groups=8,
    )
    text = TextSpec(width=64, layers=1, heads=2, context_length=demo.CONTEXT, vocab_size=49_408)
    stage = ChainSpec(
        net=CaptionedSpec(unet=unet, text=text),
        image_size=256,
        factor=4,
        schedule=LINEAR,
        predicts=ddpm.PREDICTS,
        loss="hybrid",
        told_dropout=0.0,
    )
    return TrainSpec(
        name="upsampler",
        stage=stage,
        optimizer=ddpm.OPTIMIZER,
        budget=Budget(steps=300, checkpoint_every=300, report_every=25),
        batch_size=16,
        **WORKER,
    )


def paper() -> RunSpec:
    """The published sizes (filtered: 385 M and 398 M weights), iterations and batches, for your own tars.

    Set pairs.shards and pairs.destination.

    Hardware: 8 GPUs of 80 GB (`_hardware.py`).  Time, an estimate and not measured: an H100 each, 40 % of its
    989 TFLOP/s, operations of a sample x batch x steps (tests/benchmarks/recipe_flops.py):
    base: 715 GFLOP x 2048 x 2,500,000 = 13.4 days
    guided: 715 GFLOP x 2048 x 250,000 = 1.3 days
    upsampler: 3,842 GFLOP x 512 x 1,600,000 = 11.5 days
    Published: neither hardware nor time; the paper's 3.5 B and 1.5 B weights took about DALL-E's compute.

    Departures: iterations and batches are those of the paper's larger models; CLIP's tokens in place of
    GLIDE's own, bf16 in place of fp16; the learning rate is ADM's 1e-4 and the finetuning's length ours, as
    the paper names neither; gradients are clipped at norm 1; the EMA of the weights spans a tenth of the run
    so far until it spans 10,000 steps (ADM: these from the first).
    Source: section 4 and the model card of the published code.
    """
    known = published()
    found = []
    for name, source, schedule, size, steps, batch in (
        ("base", "glide-base", COSINE, 64, 2_500_000, 2048),
        ("upsampler", "glide-upsample", LINEAR, 256, 1_600_000, 512),
    ):
        net = known[source].net
        assert isinstance(net, CaptionedSpec)
        stage = ChainSpec(
            net=net, image_size=size, factor=size // 64, schedule=schedule, loss="hybrid", told_dropout=0.0
        )
        found.append(paper_stage(name, stage, steps, batch))
    found[1] = found[1].but(micro_batch_size=16)  # 32 would take 83 GiB of a GPU
    start = found[0]
    assert isinstance(start.stage, ChainSpec)
    tuned = paper_stage("guided", start.stage.but(told_dropout=0.2), 250_000, 2048, {"start": "base"})
    return RunSpec(
        name="glide_paper",
        pairs=PairsSpec(shards=("pairs/*.tar",), destination="prepared", context_length=128),
        stages=(start, tuned, found[1]),
        cascade=cascade(128, ANCESTRAL).but(name="glide_paper"),
    )


def paper_inpainting() -> RunSpec:
    """`paper`, and both its models finetuned to fill holes, in the published sizes.

    Hardware: 8 GPUs of 80 GB.  Time, an estimate and not measured, as for `paper`, whose departures apply
    here too:
    filling: 715 GFLOP x 2048 x 250,000 = 1.3 days
    filling_upsampler: 3,844 GFLOP x 512 x 160,000 = 1.2 days
    Published: neither hardware nor time, nor length and learning rate of the finetuning; the latter two are
    ours.  Sampled as in the published notebook: guidance 5, both hops ancestral.
    Source: section 4.2 and the published code (arXiv:2112.10741).
    """
    whole = paper()
    painter = ddpm.filling(whole.stage("guided"))
    enlarger = ddpm.filling(whole.stage("upsampler"), "filling_upsampler")
    tuned = enlarger.but(budget=enlarger.budget.but(steps=160_000))
    hops = (
        HopSpec(stage="filling", how=ANCESTRAL.but(guidance_scale=5.0), follows_request=True),
        HopSpec(stage="filling_upsampler", how=FAST27.but(sampler="ddpm")),
    )
    return whole.but(
        name="glide_paper_inpainting",
        stages=(*whole.stages, painter, tuned),
        cascade=whole.cascade.but(name="glide_paper_inpainting", hops=hops),
    )


def paper_stage(
    name: str,
    stage: ChainSpec,
    steps: int,
    batch: int,
    parents: dict[str, str] | None = None,
    label: LabelSpec | None = None,
) -> TrainSpec:
    """One training run with AdamW at 1e-4 and weights averaged over 10,000 steps."""
    return TrainSpec(
        name=name,
        stage=stage,
        parents=parents or {},
        label=label,
        optimizer=OptimizerSpec(
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=0,
            betas=(0.9, 0.999),
            ema_images=10_000 * batch,
        ),
        budget=Budget(steps=steps, checkpoint_every=1_000, report_every=100),
        batch_size=batch,
        micro_batch_size=min(128, batch // PAPER_WORKERS // 2),
        **gpus_80gb(PAPER_WORKERS),
    )
