"""Latent diffusion: the base paints latents of the autoencoder, told the states of the frozen CLIP.

`run` is the system at the size of the demo, 256 px in one hop; `joint` has a text transformer of its own, as
in the paper's text-to-image model; `paper` is Stable Diffusion's first training.
Source: Rombach et al. 2022 (arXiv:2112.10752), the model card of Stable Diffusion 1.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.layouts.published import published
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.text import CaptionedSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec
from jobs.recipes import ddpm, demo, glide
from jobs.recipes._hardware import PAPER_WORKERS, any_node, gpus_80gb
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

WORKER = any_node(memory_gib=3)

SCALED = ScheduleSpec(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, last="first")
DDIM50 = SamplingSpec(sampler="ddim", num_steps=50, spacing="ldm_plus_one", guidance_scale=3.0)


def run() -> RunSpec:
    """The demo's pairs; CLIP, autoencoder, base.  Two CPUs, no GPU, up to 8 GB."""
    return ddpm.run().but(
        name="latent",
        stages=(demo.clip(), demo.autoencoder(), base()),
        cascade=cascade(DDIM50, demo.CONTEXT),
        evaluation=demo.run().evaluation,
    )


def cascade(how: SamplingSpec, context_length: int) -> CascadeSpec:
    """One hop, which decodes what it paints."""
    hop = HopSpec(stage="base", how=how, follows_request=True)
    return CascadeSpec(name="latent", hops=(hop,), context_length=context_length, image_size=256)


def vq() -> RunSpec:
    """`run` with a codebook of 1,024 vectors, part of the decoder: the base paints unquantised latents.

    Two CPUs, no GPU, up to 8 GB.
    """
    whole, before = run(), demo.autoencoder()
    assert isinstance(before.stage, AutoencoderSpec)
    book = before.but(stage=before.stage.but(net=before.stage.net.but(codes=1024)))
    cascaded = whole.cascade.but(name="latent_vq")
    return whole.but(name="latent_vq", stages=(demo.clip(), book, base()), cascade=cascaded)


def base() -> TrainSpec:
    """32 x 32 x 4 latents of 256 px; cross-attention to the caption's states; DDPM's linear betas.

    The published betas end at a noise level of 14.6, where a background as plain as these still shows: what
    begins with noise alone is then painted on grey (Lin et al. 2023, arXiv:2305.08891).  These end at 157.
    """
    unet = ddpm.UNET.but(
        channel_mult=(1, 2),
        stem_factor=2,
        attention_at=(2, 4),
        attention="cross",
        text_width=demo.TOWERS.text_width,
        text_at_level=False,
        scale_shift=False,
    )
    stage = ChainSpec(
        net=PlainSpec(unet=unet, in_channels=4, out_channels=4),
        image_size=256,
        latent_channels=4,
        schedule=ScheduleSpec(),
        predicts=ddpm.PREDICTS,
        told_dropout=0.1,
    )
    return TrainSpec(
        name="base",
        stage=stage,
        parents={"clip": "clip", "autoencoder": "autoencoder"},
        optimizer=ddpm.OPTIMIZER,
        budget=ddpm.BUDGET.but(steps=3_000),
        batch_size=ddpm.BATCH,
        **WORKER,
        samples=SamplesSpec(prompts=demo.PROMPTS, how=DDIM50.but(num_steps=20)),
    )


def joint() -> RunSpec:
    """`run`, but captions are read by a transformer that is trained jointly with the base.

    As in the paper (section 4.3.1) every token attends to every other, padding included; the published one
    has 32 layers of width 1280 and BERT's tokens, and begins with nothing.  This one begins as the text tower
    of the run's CLIP, and is trained from the second stage on: from 48,000 pictures alone it would not learn
    the words.  Two CPUs, no GPU, up to 8 GB.
    """
    whole = run()
    hop = HopSpec(stage="joint", how=DDIM50, follows_request=True)
    cascade = whole.cascade.but(name="latent_joint", hops=(hop,))
    stages = (demo.clip(), demo.autoencoder(), reading(), jointly(reading()))
    return whole.but(name="latent_joint", stages=stages, cascade=cascade)


def reading() -> TrainSpec:
    """The base with a text transformer of its own, which stays as it begins: the text tower of the CLIP."""
    before = base()
    assert isinstance(before.stage, ChainSpec)
    assert isinstance(before.stage.net, PlainSpec)
    unet = before.stage.net.unet.but(text_width=glide.WORDS.width)
    net = CaptionedSpec(unet=unet, text=glide.WORDS, in_channels=4, out_channels=4)
    return before.but(
        stage=before.stage.but(net=net, text_frozen=True),
        parents={"start": "clip", "autoencoder": "autoencoder"},
    )


def jointly(before: TrainSpec) -> TrainSpec:
    """The same trained on together with its text transformer, at a tenth of the rate."""
    assert isinstance(before.stage, ChainSpec)
    return before.but(
        name="joint",
        stage=before.stage.but(text_frozen=False),
        parents=before.parents | {"start": before.name},
        optimizer=ddpm.OPTIMIZER.but(learning_rate=3e-4),
        budget=ddpm.BUDGET.but(steps=600, checkpoint_every=300, sample_every=300),
    )


def inpainting() -> RunSpec:
    """`run`, and its base finetuned to fill holes by caption.  Two CPUs, no GPU, up to 8 GB."""
    whole = run()
    hop = HopSpec(stage="filling", how=DDIM50, follows_request=True)
    return whole.but(
        name="latent_inpainting",
        stages=(*whole.stages, filling(base())),
        cascade=whole.cascade.but(name="latent_inpainting", hops=(hop,)),
    )


def filling(before: TrainSpec) -> TrainSpec:
    """The base finetuned to fill holes."""
    budget = ddpm.BUDGET.but(steps=300, checkpoint_every=300, sample_every=150)
    return ddpm.filling(before).but(budget=budget)


def paper() -> RunSpec:
    """Stable Diffusion 1 at 256 px: UNet of 860 M, ViT-L/14, f8 autoencoder of 84 M, for your own tars.

    Set pairs.shards and pairs.destination; `clip` is downloaded by open_clip.

    Hardware: 8 GPUs of 80 GB (`_hardware.py`), for the autoencoder one of them.  Time, an estimate and not
    measured: an H100 each, 40 % of its 989 TFLOP/s, operations of a sample, its latent and caption encoded
    anew, x batch x steps (tests/benchmarks/recipe_flops.py):
    autoencoder: 3,877 GFLOP x 24 x 246,803 = 0.7 days
    base: 823 GFLOP x 2048 x 237,000 = 1.5 days
    Published: 32 x 8 A100, batch 2048, 237,000 steps at 256 px, AdamW at 1e-4 after 10,000 steps of warm-up;
    about 150,000 A100-hours for all trainings of Stable Diffusion 1, most of them at 512 px (model card).

    Departures: a tenth of the captions is dropped from the beginning (published: from the third training on);
    gradients are clipped at norm 1; the autoencoder is trained on the same tars (published: OpenImages), with
    CLIP's features in place of LPIPS, losses that are means (published: sums), and averaged weights.
    """
    net = published()["sd1"].net
    assert isinstance(net, PlainSpec)
    stage = ChainSpec(net=net, image_size=256, latent_channels=4, schedule=SCALED, told_dropout=0.1)
    return RunSpec(
        name="latent_paper",
        pairs=PairsSpec(shards=("pairs/*.tar",), destination="prepared", context_length=77, sizes=(256, 224)),
        stages=(paper_clip(), paper_autoencoder(), paper_base(stage)),
        cascade=cascade(DDIM50.but(guidance_scale=7.5), 77).but(name="latent_paper"),
    )


def paper_clip() -> TrainSpec:
    """OpenAI's ViT-L/14, not trained here; captions are padded with END, as in Stable Diffusion."""
    net = ClipNetSpec(
        embedding_width=768,
        patch_size=14,
        image_width=1024,
        image_layers=24,
        context_length=77,
        text_width=768,
        quick_gelu=True,
        pads_with="end",
    )
    return TrainSpec(
        name="clip",
        stage=ClipSpec(net=net.but(text_heads=12), pretrained="ViT-L-14/openai"),
        optimizer=OptimizerSpec(learning_rate=1e-4),
        budget=Budget(steps=1, checkpoint_every=1),
        batch_size=1,
        **WORKER,
    )


def paper_autoencoder() -> TrainSpec:
    """The published f8 with four channels: two micro-batches of 12 a step, at 4.5e-6 for each image.

    246,803 steps, as the published code says of its weights; the discriminator starts after 50,001 of them.
    """
    return TrainSpec(
        name="autoencoder",
        stage=AutoencoderSpec(net=AutoencoderNetSpec(), disc_start=50_001),
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(
            learning_rate=4.5e-6 * 24, schedule="constant", warmup_steps=0, betas=(0.5, 0.9)
        ),
        budget=Budget(steps=246_803, checkpoint_every=1_000, report_every=100),
        batch_size=24,
        micro_batch_size=12,
        **gpus_80gb(1),
    )


def paper_base(stage: ChainSpec) -> TrainSpec:
    """Stable Diffusion's optimizer and batch."""
    return TrainSpec(
        name="base",
        stage=stage,
        parents={"clip": "clip", "autoencoder": "autoencoder"},
        optimizer=OptimizerSpec(
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=10_000,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            ema_images=10_000 * 2048,
        ),
        budget=Budget(steps=237_000, checkpoint_every=1_000, report_every=100),
        batch_size=2048,
        micro_batch_size=128,
        **gpus_80gb(PAPER_WORKERS),
    )
