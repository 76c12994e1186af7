"""What the recipes of published size cost: the figures in their docstrings.

    python -m tests.benchmarks.recipe_flops [adm.run glide.paper ...]

The real stages are built and run forwards and backwards on tensors without content (workflows.hollow), and
PyTorch counts the operations of their matrix products and convolutions: two for a multiply-add.  Frozen
parents are counted where a step calls them (CLIP's states, latents); embeddings of images are not, as they
are computed once, with the data.  The days are an estimate, not a measurement: all GPUs of the recipe, or
the workers of a stage that has fewer, each an H100 at its dense bfloat16 rate of 989 TFLOP/s, of which 40 %
is assumed to be achieved.  Loading, checkpoints and samples are not counted.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from dd_core.consistency import FixedLevels, GrowingLevels
from dd_core.devices import imagined
from dd_core.stage import Stage, Trained
from dd_core.stages import StageSpec, build_stage
from dd_core.stages.clip import ClipSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from jobs.config import run_spec
from workflows.estimate import OPS, Content, nothing, numbers
from workflows.hollow import Hollowing
from workflows.run_spec import RunSpec, in_order
from workflows.train_spec import TrainSpec

RECIPES = (
    "adm.run",
    "glide.paper",
    "glide.paper_inpainting",
    "latent.paper",
    "unclip.run",
    "unclip.large",
    "unclip.published_prior",
    "unclip.autoregressive",
    "consistency.paper",
    "consistency.paper_alone",
)
PEAK, SHARE = 989e12, 0.4
"""Dense bfloat16 FLOP/s of an H100 SXM, as its maker says, and the share assumed to be achieved."""
ROWS = 2


class Cost(NamedTuple):
    """Of the training of one stage."""

    flop: float
    """Of one sample, forwards and backwards."""
    samples: int
    workers: int

    @property
    def days(self) -> float:
        """Estimated, on an H100 for each worker."""
        return self.flop * self.samples / (self.workers * PEAK * SHARE) / 86_400


class Counting(Content):
    """Tensors without content, and the operations of their products.

    No row of a teacher is asked twice: the guidance scale of teachers is 1 in these recipes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0
        self.other = list[Tensor]()
        """Masks of the rows whose scale is not 1."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is OPS.nonzero.default and any(args[0] is rows for rows in self.other):
            return torch.zeros(0, 1, dtype=torch.long)
        answer = super().__torch_dispatch__(func, types, args, kwargs)
        if func is OPS.ne.Scalar and args[0].ndim == 1 and args[0].is_floating_point():
            self.other.append(answer)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=answer)
        return answer


def costs(run: RunSpec, known: dict[str, float]) -> dict[str, Cost]:
    """Costs of every stage that is trained, in the order of training.

    Args:
        run: A run of published size, whose parents are all its own.
        known: Operations of stages that were counted before, by their spec; added to.
    """
    trained: dict[str, Trained] = {}
    found: dict[str, Cost] = {}
    with Hollowing(), Counting() as counting:
        for spec in in_order(run.stages):
            parents = {role: trained[name] for role, name in spec.parents.items()}
            stage = build_stage(at_last(spec.stage), parents)
            trained[spec.name] = Trained(spec.stage, stage.model.state_dict())
            if isinstance(spec.stage, ClipSpec) and spec.stage.pretrained:
                continue
            what = spec.stage.model_dump_json()
            if what not in known:
                counting.flop = 0
                walk(spec, stage, run.pairs.context_length)
                known[what] = counting.flop / ROWS
            found[spec.name] = Cost(known[what], spec.batch_size * spec.budget.steps, spec.num_workers)
    return found


def at_last(spec: StageSpec) -> StageSpec:
    """The spec; for growing levels with their final number, since most of the training has more than two."""
    if isinstance(spec, ConsistencySpec) and isinstance(spec.levels, GrowingLevels):
        assert spec.teacher is None or spec.teacher.guidance_scale == 1
        return spec.but(levels=FixedLevels(num_levels=spec.levels.s1 + 1))
    return spec


def walk(spec: TrainSpec, stage: Stage, context_length: int) -> None:
    """Every player's forward and backward.

    Attention is computed by plain matrix products here, which PyTorch can count on every device.
    """
    batch = nothing(spec, ROWS, context_length)
    with sdpa_kernel(SDPBackend.MATH), imagined("cuda"):
        for phase in stage.phases:
            with numbers(spec, gpu=True):
                total = stage(batch, phase).total
            total.backward()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    options = parser.parse_args()
    head = ("recipe", "stage", "GFLOP a sample", "million samples", "H100s", "days")
    sys.stdout.write(f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
    known: dict[str, float] = {}
    for name in options.recipes:
        for stage, cost in costs(run_spec(name), known).items():
            row = f"| {name} | {stage} | {cost.flop / 1e9:,.0f} | {cost.samples / 1e6:,.0f} | {cost.workers} "
            sys.stdout.write(f"{row}| {cost.days:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
