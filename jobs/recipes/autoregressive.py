"""The demo with the autoregressive prior of unCLIP in the place of the diffusion prior.

As recipe consistency, it works in the run directory of the demo and adds a stage to it.
"""

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.code_prior import CodePriorSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.autoregressive_prior import AutoregressivePriorSpec
from jobs.recipes import demo
from workflows.run_spec import RunSpec
from workflows.train_spec import TrainSpec


def run() -> RunSpec:
    """The demo's seven stages and one more; 320 captions judged over HTTP.  Two CPUs, no GPU, up to 8 GB."""
    before = demo.run()
    return before.but(stages=(*before.stages, prior()), cascade=cascade())


def prior() -> TrainSpec:
    """Caption -> image embedding in 48 codes.  Not yet trained at this size."""
    net = CodePriorSpec(
        width=192,
        head_width=64,
        text_width=demo.TOWERS.text_width,
        embedding_width=demo.TOWERS.embedding_width,
        context_length=demo.CONTEXT,
        axes=48,
        buckets=64,
    )
    return TrainSpec(
        name="autoregressive_prior",
        stage=AutoregressivePriorSpec(net=net),
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(algorithm="muon", learning_rate=1e-3, ema_images=5_000),
        budget=Budget(steps=400, checkpoint_every=200, report_every=20),
        batch_size=64,
        num_workers=1,
        resources=demo.WORKER,
    )


def cascade() -> CascadeSpec:
    """The demo's, its prior replaced."""
    before = demo.cascade()
    writing = HopSpec(stage="autoregressive_prior", how=SamplingSpec(guidance_scale=2.0, draws=2))
    return before.but(hops=tuple(writing if hop.stage == "prior" else hop for hop in before.hops))
