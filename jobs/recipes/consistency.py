"""The demo with a base of few steps: distilled from the demo's own base, and put in its place.

It works in the run directory of the demo and adds a stage to it; what the demo has trained is not trained
again.  `ddiff run --recipe consistency` then makes and judges a cascade of few steps where that of the demo
was (`ddiff run --recipe demo` brings that back): keep its summary.json to compare.  `paper` is the published
training.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.dit import DiTSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.consistency import ConsistencySpec, FixedLevels, TeacherSpec
from jobs.recipes import demo
from jobs.recipes.latent import PAPER_WORKER, PAPER_WORKERS, paper_clip
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

JUMPS = SamplingSpec(sampler="consistency", num_steps=4, guidance_scale=1.0)


def run() -> RunSpec:
    """The demo's seven stages and one more; 320 captions judged over HTTP.  Two CPUs, no GPU, up to 8 GB."""
    before = demo.run()
    return before.but(stages=(*before.stages, consistency()), cascade=cascade())


def paper() -> RunSpec:
    """Consistency distillation as published for ImageNet 64 x 64, for your own tars; networks of 302 M.

    Hardware: 64 A100, by the paper; time: not published, none measured here.  Published (table 3): N 40, mu
    0.95, RAdam at 8e-6 without decay or schedule, batch 2048, 600,000 steps, weights averaged by 0.9999432;
    the teacher is EDM's, log sigma ~ N(-1.2, 1.2), levels .002 to 80, 1e-4, batch 4096; two jumps, at the
    levels 0 and 22 of 40.  Departures: captions and our transformer in place of classes and ADM's UNet of
    296 M; the teacher has no dropout, as many steps as the student (its own are not in the paper), and the
    weights of its loss are EDM's to a factor of two; CLIP's features in place of LPIPS (`--set
    stages.consistency.stage.distance=lpips` and `...lpips_weights=FILE` bring it back); paths end at 0.
    Set pairs.shards and pairs.destination; `clip` is downloaded by open_clip.
    Source: Song et al. 2023 (arXiv:2303.01469), section 6 and appendix C.
    """
    jumps = SamplingSpec(sampler="consistency", num_steps=2, taus=(0, 22, 39), guidance_scale=1.0)
    return RunSpec(
        name="consistency_paper",
        pairs=PairsSpec(shards=("pairs/*.tar",), destination="prepared", context_length=77, sizes=(64, 224)),
        stages=(paper_clip(), paper_teacher(), paper_student(paper_teacher())),
        cascade=CascadeSpec(
            name="consistency_paper",
            hops=(HopSpec(stage="consistency", how=jumps),),
            context_length=77,
            image_size=64,
        ),
    )


def paper_teacher() -> TrainSpec:
    """The diffusion model that is followed."""
    net = DiTSpec(conv_width=256, conv_blocks=3, width=1024, layers=13, text_width=768, caption_width=768)
    stage = BaseSpec(
        net=net,
        predicts="edm",
        log_sigma_mean=-1.2,
        log_sigma_std=1.2,
        weight_range=(4.0, 250_000.0),
        sigma_min=0.002,
        sigma_max=80.0,
    )
    return TrainSpec(
        name="base",
        stage=stage,
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=0,
            betas=(0.9, 0.999),
            ema_images=10_000 * 4096,
        ),
        budget=Budget(steps=600_000, checkpoint_every=5_000, report_every=100),
        batch_size=4096,
        num_workers=PAPER_WORKERS,
        resources=PAPER_WORKER,
    )


def paper_student(teacher: TrainSpec) -> TrainSpec:
    """The published optimizer and levels."""
    assert isinstance(teacher.stage, BaseSpec)
    stage = ConsistencySpec(base=teacher.stage, levels=FixedLevels(num_levels=40, mu=0.95), distance="clip")
    return teacher.but(
        name="consistency",
        stage=stage,
        parents={"clip": "clip", "base": "base"},
        optimizer=teacher.optimizer.but(
            algorithm="radam", learning_rate=8e-6, ema_images=round(2048 / (1 - 0.9999432))
        ),
        batch_size=2048,
    )


def consistency() -> TrainSpec:
    """The base in four jumps; one is as good here, for the draft has done most before.

    Each image costs four answers of the teacher and one of the target beside the student's own.
    """
    teacher = demo.base()
    assert isinstance(teacher.stage, BaseSpec)
    stage = ConsistencySpec(
        base=teacher.stage,
        teacher=TeacherSpec(guidance_scale=1.0),
        levels=FixedLevels(num_levels=12, mu=0.9),
    )
    return TrainSpec(
        name="consistency",
        stage=stage,
        parents={"clip": "clip", "base": "base", "draft": "draft"},
        optimizer=OptimizerSpec(algorithm="muon", learning_rate=5e-4, ema_images=1_500),
        budget=Budget(steps=150, checkpoint_every=75, report_every=15, sample_every=75),
        batch_size=48,
        num_workers=1,
        resources=demo.WORKER,
        samples=SamplesSpec(how=JUMPS),
    )


def cascade() -> CascadeSpec:
    """The demo's, its base replaced."""
    before = demo.cascade()
    jumping = HopSpec(stage="consistency", how=JUMPS, follows_request=True)
    return before.but(hops=tuple(jumping if hop.stage == "base" else hop for hop in before.hops))
