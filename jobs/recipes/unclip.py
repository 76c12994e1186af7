"""unCLIP: caption -> image embedding -> 64 px -> 256 px.

`run` has the sizes of Karlo, its only published weights: prior, decoder of 893 M, upsampler of 692 M; `small`
is the published decoder between the prior and the upsampler of the demo.
Sources: Ramesh et al. 2022 (arXiv:2204.06125), table 3 (iterations, batches, rates); the model card and the
code of Karlo (sizes, frozen CLIP states in place of a text transformer).
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.layouts.published import published
from dd_core.nets.network import PlainSpec
from dd_core.nets.prior import CausalPriorSpec, PriorNetSpec
from dd_core.nets.text import UnclipSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.causal_prior import CausalPriorStageSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.prior import PriorSpec
from jobs.recipes import ddpm, demo
from jobs.recipes._hardware import PAPER_WORKER, PAPER_WORKERS
from jobs.recipes.glide import paper_stage
from jobs.recipes.latent import paper_clip
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

COSINE = ScheduleSpec(betas="cosine")
EMBEDDED_AT = 224
"""What ViT-L/14 looks at: prior and decoder hear the embeddings of these pictures."""


def run() -> RunSpec:
    """For your own tars: set pairs.shards and pairs.destination.

    Hardware and time: neither source says, and none was measured here.  Departures: the prior is our
    transformer in Karlo's width and depth, trained at continuous noise levels; the upsampler's last step is
    no network of its own, and it is sampled by DDIM.
    """
    prior = SamplingSpec(num_steps=25, guidance_scale=4.0, draws=2)
    decoder = SamplingSpec(sampler="ddpm", num_steps=50, spacing="linspace", guidance_scale=8.0)
    upsampler_how = SamplingSpec(sampler="ddim", num_steps=7, spacing="trailing", guidance_scale=1.0)
    hops = (
        HopSpec(stage="prior", how=prior),
        HopSpec(stage="decoder", how=decoder, follows_request=True),
        HopSpec(stage="upsampler", how=upsampler_how),
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
    unet = ddpm.UNET.but(
        text_width=128, text_at_level=False, level_told=True, embedding_width=demo.TOWERS.embedding_width
    )
    net = UnclipSpec(unet=unet, states_width=demo.TOWERS.text_width)
    stage = ChainSpec(
        net=net,
        schedule=COSINE,
        predicts=ddpm.PREDICTS,
        loss="hybrid",
        told_dropout=0.5,
        embedding_dropout=0.1,
    )
    told = ddpm.ANCESTRAL.but(num_steps=50, guidance_scale=2.0)
    decoder = ddpm.base().but(
        name="decoder",
        stage=stage,
        parents={"clip": "clip"},
        samples=SamplesSpec(prompts=demo.PROMPTS, how=told),
    )
    before = demo.run()
    prior, _, upsampler = before.cascade.hops
    hops = (
        HopSpec(stage="prior", how=prior.how.but(draws=2)),
        HopSpec(stage="decoder", how=told, follows_request=True),
        upsampler,
    )
    return before.but(
        name="unclip_small",
        stages=(demo.clip(), demo.prior(), decoder, demo.upsampler()),
        cascade=before.cascade.but(name="unclip_small", hops=hops),
    )


def large() -> RunSpec:
    """`run`, enlarged once more: 256 -> 1024 px by a network of 282 M (published: 300 M) in 15 steps.

    For tars with pictures of 1024 px and more.  Hardware and time: not published, not measured here.
    """
    before, again = run(), SamplingSpec(sampler="ddim", num_steps=15, spacing="trailing", guidance_scale=1.0)
    hops = (*before.cascade.hops, HopSpec(stage="large_upsampler", how=again))
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
        budget=Budget(steps=600_000, checkpoint_every=5_000, report_every=100),
        batch_size=4096,
        num_workers=PAPER_WORKERS,
        use_gpu=True,
        resources=PAPER_WORKER,
    )


def published_prior() -> RunSpec:
    """`run` with the causal prior of the paper in Karlo's size, 1,022 M, in 64 steps of analytic variance.

    Hardware and time: as `run`.  Departures: as in Karlo a fifth of the captions is kept back (paper: a
    tenth) and guidance is 4.
    """
    before = run()
    how = SamplingSpec(sampler="ddpm", num_steps=64, spacing="linspace", guidance_scale=4.0, draws=2)
    trained = prior_stage()
    net = published()["karlo-prior"].net
    assert isinstance(net, CausalPriorSpec)
    causal = trained.but(
        name="causal_prior",
        stage=CausalPriorStageSpec(
            net=net, image_size=EMBEDDED_AT, caption_dropout=0.2, measured_images=40_960
        ),
    )
    first = HopSpec(stage="causal_prior", how=how.but(variance="analytic"))
    stages = tuple(causal if stage.name == "prior" else stage for stage in before.stages)
    cascade = before.cascade.but(name="unclip_published_prior", hops=(first, *before.cascade.hops[1:]))
    return before.but(name="unclip_published_prior", stages=stages, cascade=cascade)


def decoder_stage() -> TrainSpec:
    """64 px; half the captions, a tenth of the embeddings kept back; batch 2048, 1.2e-4, 800,000 steps."""
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
    return trained.but(optimizer=optimizer, micro_batch_size=64)  # of 128 a GPU would keep 73 GiB


def upsampler() -> TrainSpec:
    """64 -> 256 px, told no caption, no attention; blurred quarters; batch 1024, 1.2e-4, a million steps."""
    net = published()["karlo-sr"].net
    assert isinstance(net, PlainSpec)
    stage = ChainSpec(
        net=net, image_size=256, factor=4, schedule=COSINE, told_dropout=0.0, degrades="blur", crop=64
    )
    trained = paper_stage("upsampler", stage, 1_000_000, 1024)
    return trained.but(optimizer=trained.optimizer.but(learning_rate=1.2e-4))


def large_upsampler() -> TrainSpec:
    """256 -> 1024 px, on quarters degraded by BSR, linear schedule; batch 512, 1e-4, a million steps."""
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
    return trained.but(micro_batch_size=16)  # of 32 a GPU would keep 73 GiB
