"""The demo with a base of few steps: distilled from the demo's own base, and put in its place.

It works in the run directory of the demo and adds a stage to it; what the demo has trained is not trained
again.  `ddiff run --recipe consistency` then makes and judges a cascade of few steps where that of the demo
was (`ddiff run --recipe demo` brings that back): keep its summary.json to compare.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.consistency import ConsistencySpec, FixedLevels, TeacherSpec
from jobs.recipes import demo
from workflows.run_spec import RunSpec
from workflows.train_spec import SamplesSpec, TrainSpec

JUMPS = SamplingSpec(sampler="consistency", num_steps=4, guidance_scale=1.0)


def run() -> RunSpec:
    """The demo's seven stages and one more; 320 captions judged over HTTP.  Two CPUs, no GPU, up to 8 GB."""
    before = demo.run()
    return before.but(stages=(*before.stages, consistency()), cascade=cascade())


def consistency() -> TrainSpec:
    """The base in four jumps.  Not yet trained at this size.

    Each image costs four answers of the teacher and one of the target beside the student's own.
    """
    teacher = demo.base()
    assert isinstance(teacher.stage, BaseSpec)
    stage = ConsistencySpec(
        base=teacher.stage,
        teacher=TeacherSpec(guidance_scale=1.5),
        levels=FixedLevels(num_levels=12, mu=0.9),
    )
    return TrainSpec(
        name="consistency",
        stage=stage,
        parents={"clip": "clip", "base": "base", "draft": "draft"},
        optimizer=OptimizerSpec(algorithm="muon", learning_rate=5e-4, ema_images=5_000),
        budget=Budget(steps=500, checkpoint_every=250, report_every=25, sample_every=250),
        batch_size=48,
        num_workers=1,
        resources=demo.WORKER,
        samples=SamplesSpec(prompts=demo.PROMPTS, how=JUMPS),
    )


def cascade() -> CascadeSpec:
    """The demo's, its base replaced."""
    before = demo.cascade()
    jumping = HopSpec(stage="consistency", how=JUMPS, follows_request=True)
    return before.but(hops=tuple(jumping if hop.stage == "base" else hop for hop in before.hops))
