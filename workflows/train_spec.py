"""What one training run of one stage is: the stage, its parents, and how it is trained."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from dd_core import sealed
from dd_core.samplers import SamplingSpec
from dd_core.spec import SafeName, Spec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages import StageSpec
from dd_core.stages.chain_hop import refuse
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.classifier import ClassifierSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from workflows import feed
from workflows.labels import LabelSpec

TECHNICAL = ("num_workers", "use_gpu", "resources", "restarts", "samples", "checkpoints_kept", "keep_every")
"""Fields of a TrainSpec that its result does not depend on."""
TECHNICAL_OF_BUDGET = ("checkpoint_every", "report_every", "sample_every")


class SamplesSpec(Spec):
    """What to draw while training, so that progress can be seen."""

    prompts: tuple[str, ...] = ()
    seed: int = 0
    """Of the first picture; each next picture has the next seed."""
    pictures: int = Field(8, ge=1)
    """How many of the data: an upsampler enlarges them, an autoencoder reconstructs them, a draft decodes
    their embeddings, a base paints from their drafts; of a prior's draw the nearest of them is shown."""
    how: SamplingSpec = SamplingSpec()


class ResourcesSpec(Spec):
    """What each worker of a stage is given, and on which nodes.  Its GPU is TrainSpec.use_gpu."""

    cpus: float | None = Field(None, gt=0)
    """Reserved in Ray.  None: one, or an equal share where there are fewer; see cpu_share."""
    memory_gib: float | None = Field(None, gt=0)
    """Reserved in Ray; less than the plan finds to be needed is refused.  None: nothing is reserved."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Of the GPU that a worker is given; a stage that needs more is refused.  None: not checked."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Of the nodes, as Ray's label selectors: `ray.io/accelerator-type: H100`, `zone: in(a, b)`, `!spot`."""
    spread: bool = False
    """Over as many nodes as there are (Ray's SPREAD); else over as few as hold the workers (PACK)."""


class TrainSpec(Spec):
    """One training run of one stage."""

    kind: Literal["train"] = "train"
    name: SafeName
    """The directory of the stage in the run."""
    stage: StageSpec
    parents: dict[str, str] = Field(default_factory=dict)
    """Role -> a stage of the same run by its name, or the path of a bundle."""
    label: LabelSpec | None = None
    """For a stage that is conditioned on classes or predicts them."""
    optimizer: OptimizerSpec
    budget: Budget
    batch_size: int = Field(ge=1)
    """Of one optimizer step, over all workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Images of one forward on one worker; smaller ones accumulate gradients.  None: no accumulation."""
    num_workers: int = Field(1, ge=1)
    use_gpu: bool | None = None
    """None: if Ray has a GPU for each worker."""
    resources: ResourcesSpec = ResourcesSpec()
    restarts: int = Field(10, ge=0)
    """How often lost workers are replaced, with no checkpoint made between, before giving up."""
    seed: int = 0
    samples: SamplesSpec = SamplesSpec()
    checkpoints_kept: int = Field(2, ge=1)
    """How many of the newest stay."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of so many steps stay for ever; 0: none."""

    @model_validator(mode="after")
    def _batches_divide(self) -> "TrainSpec":
        own = self.batch_size // self.num_workers
        if own * self.num_workers != self.batch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of num_workers {self.num_workers}")
        if own % (self.micro_batch_size or own):
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide {own}, a worker's share"
            )
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> "TrainSpec":
        classes = self.stage.classes
        by_classifier = isinstance(self.stage, ClassifierSpec)
        where = "stage.net.classes" if by_classifier else "net.unet.labels, that of nothing aside,"
        if classes and self.label is None:
            raise ValueError(f"a {self.stage.kind} learns labels; set label.path and label.classes")
        if classes and self.label is not None and len(self.label.classes) != classes:
            raise ValueError(
                f"{where} is {classes}, but label.classes names {len(self.label.classes)}; make them equal"
            )
        return self

    @model_validator(mode="after")
    def _learns(self) -> "TrainSpec":
        images = self.budget.steps * self.batch_size
        looks = 0 if "start" in self.parents else self.stage.looks_at  # those weights have measured
        if images <= looks:
            raise ValueError(
                f"a {self.stage.kind} measures {looks:,} images (measured_images) before it learns; "
                f"{self.budget.steps:,} steps of {self.batch_size} are no more than that: raise budget.steps"
            )
        return self

    @model_validator(mode="after")
    def _parents_are_named(self) -> "TrainSpec":
        for role in self.stage.needs:
            if role not in self.parents:
                raise ValueError(
                    f"parents lack {role!r}: this {self.stage.kind} stands on one; name it there"
                )
        return self

    @model_validator(mode="after")
    def _what_is_frozen_has_begun(self) -> "TrainSpec":
        match self.stage:
            case ChainSpec(text_frozen=True) if "start" not in self.parents:
                raise ValueError(
                    "stage.text_frozen would keep random weights; name a parent 'start', a CLIP or another "
                    "chain, or leave text_frozen out"
                )
            case ConsistencySpec(base=ChainSpec(text_frozen=True), teacher=None) if (
                "start" not in self.parents
            ):
                raise ValueError(
                    "stage.base.text_frozen would keep random weights, as there is no teacher; name a parent "
                    "'start', or leave it out"
                )
            case _:
                return self

    @model_validator(mode="after")
    def _can_be_sampled(self) -> "TrainSpec":
        if self.budget.sample_every and isinstance(self.stage, ChainSpec):
            refuse(self.stage, self.samples.how, ())
        return self

    def on_gpu(self, gpus: float) -> bool:
        """Whether each of its workers has a GPU, in a cluster with so many."""
        return gpus >= self.num_workers if self.use_gpu is None else self.use_gpu

    @property
    def forwards(self) -> int:
        """Of each worker in one optimizer step."""
        own = self.batch_size // self.num_workers
        return own // (self.micro_batch_size or own)

    def shaping(self) -> dict[str, Any]:
        """The fields that the result depends on.

        The micro batch size is among them where the loss compares the samples of a forward, as that of all
        workers where it compares theirs; elsewhere it only decides the last bits and which noise a sample
        gets, as num_workers does.
        """
        fields = self.model_dump(mode="json", exclude={*TECHNICAL, "parents"})
        for name in TECHNICAL_OF_BUDGET:
            del fields["budget"][name]
        if not self.stage.compares:
            fields["micro_batch_size"] = None
        elif self.micro_batch_size and self.stage.gathers:
            fields["micro_batch_size"] = self.micro_batch_size * self.num_workers
        return fields

    def fingerprint(
        self,
        data: str,
        parents: Mapping[str, str],
        files: Mapping[str, str] | None = None,
        *,
        embeddings: int = feed.EMBEDDINGS,
    ) -> str:
        """Digest of all that the result depends on: equal fingerprints mean equivalent weights.

        Args:
            data: Digest of the prepared data.
            parents: Role -> digest.
            files: Field of the stage that names a file -> its sha256.
            embeddings: Version of how they are made (`feed.EMBEDDINGS`).
        """
        return self.digest_of(self.shaping(), data, parents, files or {}, embeddings)

    def old_fingerprint(self, data: str, parents: Mapping[str, str]) -> str:
        """The fingerprint of older versions, which depends on micro_batch_size and ignores files."""
        fields = self.shaping() | {"micro_batch_size": self.micro_batch_size}
        return self.digest_of(fields, data, parents, {}, 1)

    def digest_of(
        self,
        fields: Mapping[str, Any],
        data: str,
        parents: Mapping[str, str],
        files: Mapping[str, str],
        embeddings: int,
    ) -> str:
        """sha256 of all of it; without embeddings or files they are left out, as before these existed."""
        body: dict[str, Any] = {"spec": dict(fields), "data": data, "parents": dict(parents)}
        if self.stage.embedded_by is not None:
            body["embeddings"] = embeddings
        if files:
            body["files"] = dict(files)
        return sealed.digest_of(body)


def cpu_share(total: float, workers: int, at_once: int) -> float:
    """CPUs that are reserved for each worker of a stage, if its spec does not say.

    One, or less where otherwise half a CPU would not be left for the read tasks.  Stages that train side by
    side have equal shares of the rest, so that any of them fit together and none waits for another's CPUs.

    Args:
        total: CPUs of all nodes.
        workers: Of the stage.
        at_once: How many stages may train side by side.
    """
    share = (total - 0.5) / (workers * at_once)
    return max(0.01, min(1.0, math.floor(share * 100 + 1e-9) / 100))
