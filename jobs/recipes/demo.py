"""The demo: a cascade that paints captions of the embedded world, trained on two CPUs while you wait."""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.dit import DiTSpec
from dd_core.nets.perceptual import PatchGanSpec
from dd_core.nets.prior import PriorNetSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.draft import DraftSpec
from dd_core.stages.noised_clip import NoisedClipSpec
from dd_core.stages.prior import PriorSpec
from dd_core.stages.upsampler import UpsamplerSpec
from jobs.recipes._hardware import any_node
from workflows.evaluation_spec import EvaluationSpec
from workflows.pairs import PairsSpec
from workflows.run_spec import MADE_HERE, RunSpec
from workflows.shape_shards import ShapesSpec
from workflows.train_spec import SamplesSpec, TrainSpec

CONTEXT = 32
WORKER = any_node(memory_gib=2)
TOWERS = ClipNetSpec(
    embedding_width=128,
    image_size=64,
    patch_size=16,
    stem="convolutions",
    image_width=192,
    image_layers=4,
    context_length=CONTEXT,
    text_width=192,
    text_layers=3,
    head_width=64,
)
PROMPTS = (
    "a big red circle on a white background",
    "a small blue square above a big green star",
    "a yellow triangle to the left of a purple cross",
    "a small pink diamond in the top right corner",
)


def run() -> RunSpec:
    """50,000 pairs, seven stages, 320 captions judged over HTTP.  Two CPUs, no GPU, up to 8 GB."""
    return RunSpec(
        name="demo",
        shapes=ShapesSpec(pairs=50_000),
        pairs=PairsSpec(shards=MADE_HERE, destination="prepared", context_length=CONTEXT),
        stages=(clip(), upsampler(), prior(), draft(), base(), autoencoder(), noised_clip()),
        at_once=2,
        cascade=cascade(),
        evaluation=EvaluationSpec(captions=320),
    )


def clip() -> TrainSpec:
    """Image and text towers, and a captioner that makes the embedding hold what captions say."""
    return TrainSpec(
        name="clip",
        stage=ClipSpec(net=TOWERS, captioner_layers=1),
        optimizer=OptimizerSpec(
            algorithm="muon_named", learning_rate=1e-3, warmup_steps=20, ema_images=5_000
        ),
        budget=Budget(steps=900, checkpoint_every=150, report_every=20),
        batch_size=96,
        **WORKER,
    )


def autoencoder() -> TrainSpec:
    """256 px to 32 x 32 x 4, on crops of 128 px.  Expected: 31 dB after 80 s."""
    net = AutoencoderNetSpec(width=64, channel_mult=(1,), blocks=1, stem=8, norm="none", mid_attention=False)
    return TrainSpec(
        name="autoencoder",
        stage=AutoencoderSpec(
            net=net,
            crop=128,
            square_weight=2.0,
            perceptual="clip",
            perceptual_weight=0.1,
            discriminator=PatchGanSpec(width=16, layers=2),
            disc_start=700,
            disc_weight=0.1,
        ),
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(algorithm="muon_unet", learning_rate=2e-3, warmup_steps=50, ema_images=400),
        budget=Budget(steps=900, checkpoint_every=450, report_every=50, sample_every=225),
        batch_size=4,
        **WORKER,
        samples=SamplesSpec(pictures=4),
    )


def noised_clip() -> TrainSpec:
    """The image tower, told the noise level."""
    return TrainSpec(
        name="noised_clip",
        stage=NoisedClipSpec(net=TOWERS),
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(learning_rate=1e-3, ema_images=3_000),
        budget=Budget(steps=120, checkpoint_every=60, report_every=15),
        batch_size=64,
        **WORKER,
    )


def draft() -> TrainSpec:
    """Image embedding -> 64 px in one call, which settles most of a picture of this world."""
    return TrainSpec(
        name="draft",
        stage=DraftSpec(embedding_width=TOWERS.embedding_width, embedding_noise=0.1),
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(
            algorithm="muon_named", learning_rate=3e-3, warmup_steps=50, ema_images=3_000
        ),
        budget=Budget(steps=2_400, checkpoint_every=300, report_every=100, sample_every=600),
        batch_size=64,
        **WORKER,
        samples=SamplesSpec(pictures=4),
    )


def base() -> TrainSpec:
    """64 px, told the caption's states and the image embedding, shown the draft decoded from it."""
    net = DiTSpec(
        conv_blocks=1,
        layers=4,
        text_width=TOWERS.text_width,
        caption_width=TOWERS.embedding_width,
        embedding_width=TOWERS.embedding_width,
    )
    stage = BaseSpec(
        net=net,
        log_sigma_mean=-0.3,
        log_sigma_std=1.4,
        weight_range=(0.5, 4.0),
        sigma_min=0.1,
        caption_dropout=0.05,
        embedding_dropout=0.0,
        embedding_noise=0.1,
        from_draft=True,
    )
    return TrainSpec(
        name="base",
        stage=stage,
        parents={"clip": "clip", "draft": "draft"},
        optimizer=OptimizerSpec(algorithm="muon", learning_rate=2e-3, ema_images=6_000),
        budget=Budget(steps=120, checkpoint_every=60, report_every=10, sample_every=30),
        batch_size=48,
        **WORKER,
        samples=SamplesSpec(pictures=4, how=SamplingSpec(num_steps=15, guidance_scale=1.0)),
    )


def upsampler() -> TrainSpec:
    """64 -> 256 px, on crops of 64 px."""
    net = UNetSpec(
        width=48,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_at=(),
        attention_in_middle=False,
        groups=16,
        stem="unshuffle",
        stem_factor=4,
        image_channels=3,
    )
    return TrainSpec(
        name="upsampler",
        stage=UpsamplerSpec(net=net),
        optimizer=OptimizerSpec(learning_rate=2e-3, ema_images=5_000),
        budget=Budget(steps=600, checkpoint_every=100, report_every=25, sample_every=150),
        batch_size=64,
        **WORKER,
        samples=SamplesSpec(pictures=4, how=SamplingSpec(num_steps=4, guidance_scale=1.0)),
    )


def prior() -> TrainSpec:
    """Caption -> image embedding."""
    net = PriorNetSpec(
        width=192,
        layers=1,
        head_width=64,
        text_width=TOWERS.text_width,
        embedding_width=TOWERS.embedding_width,
        context_length=CONTEXT,
    )
    return TrainSpec(
        name="prior",
        stage=PriorSpec(net=net, draws_per_caption=2),
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(
            algorithm="muon_named", learning_rate=3e-3, weight_decay=0.2, ema_images=10_000
        ),
        budget=Budget(steps=1_250, checkpoint_every=125, report_every=20, sample_every=250),
        batch_size=256,
        **WORKER,
        samples=SamplesSpec(pictures=32, how=SamplingSpec(num_steps=10, guidance_scale=1.0)),
    )


def cascade() -> CascadeSpec:
    """Prior, whose draws are ranked by what the draft paints of them; base; upsampler."""
    return CascadeSpec(
        name="demo",
        hops=(
            HopSpec(
                stage="prior",
                how=SamplingSpec(num_steps=10, guidance_scale=1.0, draws=16),
                guides={"draft": "draft"},
            ),
            HopSpec(stage="base", how=SamplingSpec(num_steps=15, guidance_scale=1.0), follows_request=True),
            HopSpec(stage="upsampler", how=SamplingSpec(num_steps=4, guidance_scale=1.0)),
        ),
        context_length=CONTEXT,
        image_size=256,
    )
