"""unCLIP: caption -> image embedding -> 64 px -> 256 px.

`run` has the sizes of Karlo, the only published weights of unCLIP: prior, decoder of 893 M, upsampler of
692 M; in `published_prior` and `autoregressive` the priors are those of the paper.  At the demo's size,
`small` has the published decoder between the demo's prior and upsampler, `small_causal` the published three.
Sources: Ramesh et al. 2022 (arXiv:2204.06125), table 3 (iterations, batches, rates); the model card and the
code of Karlo (sizes, frozen CLIP states in place of a text transformer).
"""

from typing import Literal

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.layouts.published import published
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.code_prior import CodePriorSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.prior import CausalPriorSpec, PriorNetSpec
from dd_core.nets.text import UnclipSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.autoregressive_prior import AutoregressivePriorSpec
from dd_core.stages.causal_prior import CausalPriorStageSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.prior import PriorSpec
from jobs.recipes import ddpm, demo
from jobs.recipes._hardware import PAPER_WORKERS, gpus_80gb
from jobs.recipes.glide import paper_stage
from jobs.recipes.latent import paper_clip
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

COSINE = ScheduleSpec(betas="cosine")
SMALL = ddpm.ANCESTRAL.but(num_steps=50, guidance_scale=2.0)
ANALYTIC = SamplingSpec(
    sampler="ddpm", num_steps=64, spacing="linspace", variance="analytic", guidance_scale=4.0, draws=2
)
DDIM7 = SamplingSpec(sampler="ddim", num_steps=7, spacing="trailing", guidance_scale=1.0)
EMBEDDED_AT = 224
"""Side of ViT-L/14's input: prior and decoder are told embeddings of pictures of this size."""


def run() -> RunSpec:
    """Karlo's sizes, for your own tars: set pairs.shards and pairs.destination.

    Hardware: 8 GPUs of 80 GB (`_hardware.py`).  Time, an estimate and not measured: an H100 each, 40 % of its
    989 TFLOP/s, operations of a sample x batch x steps (tests/benchmarks/recipe_flops.py); embeddings of
    images, which are computed once, are not counted:
    prior: 513 GFLOP x 4096 x 600,000 = 4.6 days
    decoder: 1,839 GFLOP x 2048 x 800,000 = 11.0 days
    upsampler: 1,593 GFLOP x 1024 x 1,000,000 = 6.0 days
    Published: neither hardware nor time, in either source.

    Departures: the prior is our transformer in Karlo's width and depth, trained at continuous noise levels,
    and of two draws keeps the one it finds likelier (paper: the one nearer to the caption); the upsampler's
    last step has no network of its own, and it is sampled by DDIM; Adam's epsilon is 1e-8 for the priors
    too (table 3: 1e-6, autoregressive 1e-10); gradients are clipped at norm 1; EMAs of weights span a tenth
    of the run so far until they span 10,000 steps (table 3: these from the first); bf16.
    """
    prior = SamplingSpec(num_steps=25, guidance_scale=4.0, draws=2)
    decoder = SamplingSpec(sampler="ddpm", num_steps=50, spacing="linspace", guidance_scale=8.0)
    hops = (
        HopSpec(stage="prior", how=prior),
        HopSpec(stage="decoder", how=decoder, follows_request=True),
        HopSpec(stage="upsampler", how=DDIM7),
    )
    return RunSpec(
        name="unclip",
        pairs=PairsSpec(
            shards=("pairs/*.tar",), destination="prepared", context_length=77, sizes=(64, EMBEDDED_AT, 256)
        ),
        stages=(paper_clip(), prior_stage(), decoder_stage(), upsampler()),
        cascade=CascadeSpec(name="unclip", hops=hops, context_length=77, image_size=256),
    )


def small() -> RunSpec:
    """The demo's pairs, CLIP, prior and upsampler, 320 captions judged.  Two CPUs, no GPU, up to 8 GB."""
    before = demo.run()
    prior, _, upsampler = before.cascade.hops
    hops = (
        HopSpec(stage="prior", how=prior.how.but(draws=2)),
        HopSpec(stage="decoder", how=SMALL, follows_request=True),
        upsampler,
    )
    return before.but(
        name="unclip_small",
        stages=(demo.clip(), demo.prior(), small_decoder(demo.TOWERS), demo.upsampler()),
        cascade=before.cascade.but(name="unclip_small", hops=hops),
    )


def small_causal() -> RunSpec:
    """The demo's pairs; the published prior, decoder and blurred upsampler; 320 captions judged.

    The demo's CLIP is trained anew with embeddings as wide as its states, since that prior takes one width.

    Two CPUs, no GPU, up to 8 GB.
    """
    before, clip = demo.run(), demo.clip()
    towers = demo.TOWERS.but(embedding_width=demo.TOWERS.text_width)
    assert isinstance(clip.stage, ClipSpec)
    net = CausalPriorSpec(
        width=192, layers=2, heads=3, context_length=demo.CONTEXT, embedding_width=towers.embedding_width
    )
    prior = demo.prior().but(name="causal_prior", stage=CausalPriorStageSpec(net=net))
    hops = (
        HopSpec(stage="causal_prior", how=ANALYTIC.but(guidance_scale=1.0)),
        HopSpec(stage="decoder", how=SMALL, follows_request=True),
        HopSpec(stage="upsampler", how=DDIM7),
    )
    return before.but(
        name="unclip_small_causal",
        stages=(clip.but(stage=clip.stage.but(net=towers)), prior, small_decoder(towers), enlarging("blur")),
        cascade=before.cascade.but(name="unclip_small_causal", hops=hops),
    )


def small_decoder(towers: ClipNetSpec) -> TrainSpec:
    """64 px, told captions and embeddings by a CLIP with these towers; dropouts as published.

    Linear betas, the published decoder has cosine: see glide.base.
    """
    unet = ddpm.UNET.but(
        text_width=128, text_at_level=False, level_told=True, embedding_width=towers.embedding_width
    )
    stage = ChainSpec(
        net=UnclipSpec(unet=unet, states_width=towers.text_width),
        schedule=ScheduleSpec(),
        predicts=ddpm.PREDICTS,
        loss="hybrid",
        told_dropout=0.5,
        embedding_dropout=0.1,
    )
    return ddpm.base().but(
        name="decoder",
        stage=stage,
        parents={"clip": "clip"},
        budget=ddpm.BUDGET.but(steps=4_000),
        samples=SamplesSpec(prompts=demo.PROMPTS, how=SMALL),
    )


def enlarging(degrades: Literal["blur", "bsr"]) -> TrainSpec:
    """64 -> 256 px, trained on crops of 64 px whose small picture is degraded as published."""
    unet = ddpm.UNET.but(
        width=48, blocks_per_level=1, attention_at=(), attention_in_middle=False, image_channels=3
    )
    stage = ChainSpec(
        net=PlainSpec(unet=unet),
        image_size=256,
        factor=4,
        schedule=COSINE,
        predicts=ddpm.PREDICTS,
        told_dropout=0.0,
        degrades=degrades,
        crop=64,
    )
    return ddpm.base().but(
        name="upsampler",
        stage=stage,
        budget=Budget(steps=600, checkpoint_every=300, report_every=25),
        batch_size=64,
    )


def large() -> RunSpec:
    """`run`, enlarged once more: 256 -> 1024 px by a network of 282 M (published: 300 M) in 15 steps.

    For tars with pictures of 1024 px and more.  Hardware: 8 GPUs of 80 GB.  Time, an estimate and not
    measured, as for `run`, whose departures apply here too:
    large_upsampler: 3,718 GFLOP x 512 x 1,000,000 = 7.0 days
    Published: neither hardware nor time.
    """
    before = run()
    hops = (*before.cascade.hops, HopSpec(stage="large_upsampler", how=DDIM7.but(num_steps=15)))
    assert before.pairs is not None
    return before.but(
        name="unclip_large",
        pairs=before.pairs.but(sizes=(*before.pairs.sizes, 1024), min_side=1024),
        stages=(*before.stages, large_upsampler()),
        cascade=before.cascade.but(name="unclip_large", hops=hops, image_size=1024),
    )


def prior_stage() -> TrainSpec:
    """Width 2048, 20 layers, on ViT-L/14; batch 4096, 1.1e-4, weight decay .06, 600,000 steps."""
    net = PriorNetSpec(width=2048, layers=20, text_width=768, embedding_width=768, context_length=77)
    return TrainSpec(
        name="prior",
        stage=PriorSpec(net=net, image_size=EMBEDDED_AT),
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(
            learning_rate=1.1e-4,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.06,
            betas=(0.9, 0.96),
            ema_images=10_000 * 4096,
        ),
        budget=Budget(steps=600_000, checkpoint_every=1_000, report_every=100),
        batch_size=4096,
        micro_batch_size=256,  # 512 would take 74 GiB of a GPU
        **gpus_80gb(PAPER_WORKERS),
    )


def published_prior() -> RunSpec:
    """`run` with the causal prior of the paper in Karlo's size, 1,022 M, in 64 steps of analytic variance.

    Hardware: 8 GPUs of 80 GB.  Time, an estimate and not measured, as for `run`:
    causal_prior: 506 GFLOP x 4096 x 600,000 = 4.5 days
    Published: neither hardware nor time.

    Departures: those of `run` but for the prior; as in Karlo a fifth of the captions is dropped (paper: a
    tenth) and guidance is 4.
    """
    trained = prior_stage()
    net = published()["karlo-prior"].net
    assert isinstance(net, CausalPriorSpec)
    causal = trained.but(
        name="causal_prior",
        stage=CausalPriorStageSpec(
            net=net, image_size=EMBEDDED_AT, caption_dropout=0.2, measured_images=40_960
        ),
    )
    return begun("unclip_published_prior", causal, ANALYTIC)


def autoregressive() -> RunSpec:
    """`run` with the paper's autoregressive prior: width 1664, 24 layers, 26 heads; 319 axes, 1024 buckets.

    Batch 4096, 1.6e-4, weight decay .04, a million steps, EMA .999 (section 2.2 and table 3).

    Hardware: 8 GPUs of 80 GB.  Time, an estimate and not measured, as for `run`:
    autoregressive_prior: 2,007 GFLOP x 4096 x 1,000,000 = 30.1 days
    Published: neither hardware nor time.

    Departures: those of `run` but for the prior; captions are told as the states of ViT-L/14 (paper: tokens
    that the prior reads itself); the axes are 319 of 768 (paper: of the 1024 of ViT-H/16); guidance is 4, as
    in `run`.
    """
    net = CodePriorSpec(
        width=1664,
        layers=24,
        head_width=64,
        text_width=768,
        embedding_width=768,
        context_length=77,
        axes=319,
        buckets=1024,
    )
    trained = prior_stage()
    stage = AutoregressivePriorSpec(net=net, image_size=EMBEDDED_AT, measured_images=40_960)
    optimizer = trained.optimizer.but(
        learning_rate=1.6e-4, weight_decay=0.04, betas=(0.9, 0.91), ema_images=1_000 * 4096
    )
    writing = trained.but(
        name="autoregressive_prior",
        stage=stage,
        optimizer=optimizer,
        budget=trained.budget.but(steps=1_000_000),
        micro_batch_size=64,
    )
    return begun("unclip_autoregressive", writing, SamplingSpec(guidance_scale=4.0))


def begun(name: str, prior: TrainSpec, how: SamplingSpec) -> RunSpec:
    """`run` with another prior in the place of its own."""
    before = run()
    stages = tuple(prior if stage.name == "prior" else stage for stage in before.stages)
    hops = (HopSpec(stage=prior.name, how=how), *before.cascade.hops[1:])
    return before.but(name=name, stages=stages, cascade=before.cascade.but(name=name, hops=hops))


def decoder_stage() -> TrainSpec:
    """64 px; half the captions, a tenth of the embeddings dropped; batch 2048, 1.2e-4, 800,000 steps."""
    net = published()["karlo-decoder"].net
    assert isinstance(net, UnclipSpec)
    stage = ChainSpec(
        net=net,
        embedded_at=EMBEDDED_AT,
        schedule=COSINE,
        loss="hybrid",
        told_dropout=0.5,
        embedding_dropout=0.1,
    )
    trained = paper_stage("decoder", stage, 800_000, 2048, {"clip": "clip"})
    optimizer = trained.optimizer.but(learning_rate=1.2e-4)
    return trained.but(optimizer=optimizer, micro_batch_size=64)  # 128 would take 73 GiB of a GPU


def upsampler() -> TrainSpec:
    """64 -> 256 px, blurred 64 px crops, no caption, no attention, dropout .1; 1024, 1.2e-4, 1 M steps."""
    net = published()["karlo-sr"].net
    assert isinstance(net, PlainSpec)
    stage = ChainSpec(
        net=net.but(unet=net.unet.but(dropout=0.1)),
        image_size=256,
        factor=4,
        schedule=COSINE,
        told_dropout=0.0,
        degrades="blur",
        crop=64,
    )
    trained = paper_stage("upsampler", stage, 1_000_000, 1024)
    return trained.but(optimizer=trained.optimizer.but(learning_rate=1.2e-4))


def large_upsampler() -> TrainSpec:
    """256 -> 1024 px, on 256 px crops degraded by BSR, linear schedule; batch 512, 1e-4, a million steps."""
    unet = UNetSpec(
        width=192,
        channel_mult=(1, 1, 2, 2, 4, 4),
        blocks_per_level=2,
        attention_at=(),
        attention_in_middle=False,
        level_scale=1,
        image_channels=3,
    )
    stage = ChainSpec(
        net=PlainSpec(unet=unet), image_size=1024, factor=4, told_dropout=0.0, degrades="bsr", crop=256
    )
    trained = paper_stage("large_upsampler", stage, 1_000_000, 512)
    return trained.but(micro_batch_size=16)  # 32 would take 73 GiB of a GPU
