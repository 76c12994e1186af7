"""The demo with a few-step base, distilled from the demo's own base and used in its place.

It works in the run directory of the demo and adds a stage to it; what the demo has trained is not trained
again.  `ddiff run --recipe consistency` then builds and evaluates a few-step cascade in place of the demo's
(`ddiff run --recipe demo` restores that one): to compare, save the demo's summary.json first.  `classes` and
`edm` distil class-conditional models, `alone` trains without a teacher; `paper` and `paper_alone` are the
published trainings.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.consistency import FixedLevels, GrowingLevels
from dd_core.layouts.published import published
from dd_core.nets.network import PlainSpec
from dd_core.samplers import SamplingSpec
from dd_core.schedules import LogNormalSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from jobs.recipes import demo, improved_ddpm
from jobs.recipes._hardware import PAPER_WORKERS, gpus_80gb
from jobs.recipes.adm import CLASSES
from jobs.recipes.latent import paper_clip
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

JUMPS = SamplingSpec(sampler="consistency", num_steps=4, guidance_scale=1.0)


def run() -> RunSpec:
    """The demo and a student of its base, which paints in four jumps.  Two CPUs, no GPU, up to 8 GB."""
    before = demo.run()
    return before.but(stages=(*before.stages, consistency()), cascade=cascade())


def classes() -> RunSpec:
    """The base of `improved_ddpm`, and a student of it that paints classes in a few jumps.

    Two CPUs, no GPU, up to 8 GB.  Results are in README.
    """
    before = improved_ddpm.run()
    hop = HopSpec(stage="consistency", how=JUMPS, follows_request=True)
    return before.but(
        stages=(*before.stages, student_of_classes(before.stage("base"))),
        cascade=before.cascade.but(hops=(hop,)),
    )


def student_of_classes(teacher: TrainSpec) -> TrainSpec:
    """Distils sixteen guided teacher steps into four jumps, on the paths that the teacher walks from noise.

    A batch is four such paths, each of four jumps; a path costs 32 evaluations of the teacher.
    """
    assert isinstance(teacher.stage, ChainSpec)
    stage = ConsistencySpec(
        base=teacher.stage,
        teacher=TeacherSpec(guidance_scale=4.0, solver="ddim", steps=4, paths_from="noise"),
        levels=FixedLevels(num_levels=5),
        segments=4,
        sigma_max=80.0,
        sigma_min=0.03,
        distance="l2",
    )
    return teacher.but(
        name="consistency",
        stage=stage,
        parents={"base": teacher.name},
        optimizer=OptimizerSpec(algorithm="muon_unet", learning_rate=2e-3, warmup_steps=20, ema_images=400),
        budget=Budget(steps=3_000, checkpoint_every=500, report_every=50, sample_every=1_000),
        batch_size=4,
        samples=SamplesSpec(prompts=("",) * 8, how=JUMPS),
    )


def edm() -> RunSpec:
    """`classes` with a teacher after EDM: continuous noise levels, its scaling and loss weights, Heun steps.

    Two CPUs, no GPU, up to 8 GB.  Source of the teacher: Karras et al. 2022 (arXiv:2206.00364), table 1;
    sizes are ours.
    """
    before = classes()
    teacher = edm_teacher()
    return before.but(
        name="consistency_edm",
        stages=(teacher, student_of_classes(teacher)),
        cascade=before.cascade.but(name="consistency_edm"),
    )


def edm_teacher() -> TrainSpec:
    """The base of `improved_ddpm`, at EDM's levels, without learned variance; a tenth of labels dropped."""
    before = improved_ddpm.base()
    assert isinstance(before.stage, ChainSpec)
    assert isinstance(before.stage.net, PlainSpec)
    stage = ChainSpec(
        net=before.stage.net.but(out_channels=3), schedule=LogNormalSpec(), predicts="edm", told_dropout=0.1
    )
    how = SamplingSpec(sampler="heun", num_steps=18, guidance_scale=3.0)
    return before.but(stage=stage, samples=before.samples.but(how=how))


def alone() -> RunSpec:
    """Consistency training without a teacher, at the size of the demo: paints classes in two jumps.

    During training the number of levels grows from 2 to 51 and the target follows ever more slowly; no label
    is dropped, since nothing guides it.  Two CPUs, no GPU, up to 8 GB.
    Source: Song et al. 2023 (arXiv:2303.01469), algorithm 3 and appendix C; sizes, steps and the distance,
    pseudo-Huber, are ours.
    """
    before, teacher = classes(), edm_teacher()
    assert isinstance(teacher.stage, ChainSpec)
    assert isinstance(teacher.stage.net, PlainSpec)
    net = teacher.stage.net.but(unet=teacher.stage.net.unet.but(labels=len(improved_ddpm.LABEL.classes)))
    steps, twice = 2_000, JUMPS.but(num_steps=2)
    learner = teacher.but(
        name="consistency",
        stage=ConsistencySpec(
            base=teacher.stage.but(net=net, told_dropout=0.0),
            teacher=None,
            levels=GrowingLevels(steps=steps, s1=50),
        ),
        budget=teacher.budget.but(steps=steps),
        samples=teacher.samples.but(how=twice),
    )
    hop = HopSpec(stage="consistency", how=twice, follows_request=True)
    return before.but(
        name="consistency_alone",
        stages=(learner,),
        cascade=before.cascade.but(name="consistency_alone", hops=(hop,)),
    )


def paper() -> RunSpec:
    """Consistency distillation as published for ImageNet 64 x 64: EDM's and the student's UNet of 296 M each.

    Hardware: 8 GPUs of 80 GB (`_hardware.py`).  Time, an estimate and not measured: an H100 each, 40 % of its
    989 TFLOP/s, operations of a sample x batch x steps (tests/benchmarks/recipe_flops.py):
    base: 658 GFLOP x 4096 x 600,000 = 5.9 days
    consistency: 1,563 GFLOP x 2048 x 600,000 = 7.0 days
    Published: 64 A100 for both of these systems; no time.

    As published: ADM's UNet, told the class, which the json beside an image has; N 40, mu .95, RAdam at 8e-6
    without decay or schedule, batches of 2048, 600,000 steps, weights averaged by .9999432, no dropout; the
    teacher with dropout .1, log sigma ~ N(-1.2, 1.2), EDM's weights, RAdam at 1e-4, batches of 4096; levels
    .002 to 80; two jumps, at the levels 0 and 22 of 40.

    Departures: CLIP's features in place of LPIPS (`--set stages.consistency.stage.distance=lpips` and
    `...lpips_weights=FILE` bring it back); paths end at 0 (published: .002), where EDM's scaling is the one
    published for students; the teacher is trained for as many steps as the student (the paper does not give
    its number); bf16 for fp16; gradients are clipped at norm 1; the EMA spans a tenth of the run so far until
    it spans .9999432's 17,600 steps (published: these from the first step); no mirroring (published: half of
    the images).  Set pairs.shards and pairs.destination; `clip` is downloaded by open_clip.
    Source: Song et al. 2023 (arXiv:2303.01469), section 6 and appendix C, and the published code.
    """
    return paper_run("consistency_paper", paper_student(paper_teacher()), (0, 22, 39), paper_teacher())


def paper_alone() -> RunSpec:
    """Consistency training without a teacher, as published for the same images; one network of 296 M.

    Hardware: 8 GPUs of 80 GB.  Time, an estimate and not measured, as for `paper`, whose departures apply
    here too:
    consistency: 1,124 GFLOP x 2048 x 800,000 = 6.7 days
    Published: 64 A100; no time.

    As published: N from 2 to 201 over 800,000 steps, mu by the paper's formula from .95 (`--set
    stages.consistency.stage.levels.form=openai_code` by the code's), RAdam at 8e-6 (the published script:
    1e-4), batch 2048; two jumps, at the levels 0 and 106 of 201.
    Source: Song et al. 2023 (arXiv:2303.01469), section 6 and appendix C, and the published code.
    """
    student, steps = paper_student(paper_teacher()), 800_000
    assert isinstance(student.stage, ConsistencySpec)
    levels = GrowingLevels(steps=steps, s0=2, s1=200, mu0=0.95)
    alone = student.but(
        stage=student.stage.but(teacher=None, levels=levels),
        parents={"clip": "clip"},
        budget=student.budget.but(steps=steps),
    )
    return paper_run("consistency_paper_alone", alone, (0, 106, 200))


def paper_run(name: str, student: TrainSpec, taus: tuple[int, ...], *before: TrainSpec) -> RunSpec:
    """A run on ImageNet whose cascade is a consistency model that jumps between the levels `taus`."""
    jumps = JUMPS.but(num_steps=len(taus) - 1, taus=taus)
    return RunSpec(
        name=name,
        pairs=PairsSpec(
            shards=("imagenet/*.tar",), destination="prepared", context_length=77, sizes=(64, 224)
        ),
        stages=(paper_clip(), *before, student),
        cascade=CascadeSpec(
            name=name,
            hops=(HopSpec(stage=student.name, how=jumps, follows_request=True),),
            context_length=77,
            image_size=64,
        ),
    )


def paper_teacher() -> TrainSpec:
    """EDM, the teacher of the distillation."""
    net = published()["edm-imagenet64"].net
    assert isinstance(net, PlainSpec)
    stage = ChainSpec(net=net, schedule=LogNormalSpec(), predicts="edm", told_dropout=0.0)
    return TrainSpec(
        name="base",
        stage=stage,
        label=CLASSES,
        optimizer=OptimizerSpec(
            algorithm="radam",
            learning_rate=1e-4,
            schedule="constant",
            warmup_steps=0,
            betas=(0.9, 0.999),
            ema_images=round(4096 / (1 - 0.9999432)),
        ),
        budget=Budget(steps=600_000, checkpoint_every=1_000, report_every=100),
        batch_size=4096,
        micro_batch_size=32,
        **gpus_80gb(PAPER_WORKERS),
    )


def paper_student(teacher: TrainSpec) -> TrainSpec:
    """The distilled student, with the published optimizer and levels."""
    assert isinstance(teacher.stage, ChainSpec)
    stage = ConsistencySpec(
        base=teacher.stage.but(net=published()["consistency-imagenet64"].net),
        teacher=TeacherSpec(guidance_scale=1.0, clipped=False),
        levels=FixedLevels(num_levels=40, mu=0.95),
        distance="clip",
    )
    return teacher.but(
        name="consistency",
        stage=stage,
        parents={"clip": "clip", "base": "base"},
        optimizer=teacher.optimizer.but(learning_rate=8e-6, ema_images=round(2048 / (1 - 0.9999432))),
        batch_size=2048,
    )


def consistency() -> TrainSpec:
    """The base in four jumps; a single one is as good here, since the draft has done most of the work.

    Beside the student's own, an image costs two evaluations of the teacher (an unguided Heun step) and one of
    the target.
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
        **demo.WORKER,
        samples=SamplesSpec(how=JUMPS),
    )


def cascade() -> CascadeSpec:
    """The demo's cascade with its base replaced."""
    before = demo.cascade()
    jumping = HopSpec(stage="consistency", how=JUMPS, follows_request=True)
    return before.but(hops=tuple(jumping if hop.stage == "base" else hop for hop in before.hops))
