"""What a whole run is: data, stages, cascade and how it is judged.  Reading one needs no Ray."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.spec import SafeName, Spec
from dd_core.stage import LearnsEmbeddings
from dd_core.stages.asking import refuse_cascade, refuse_guides, refuse_sampling
from dd_core.stages.consistency_spec import ConsistencySpec
from workflows.addresses import redacted
from workflows.evaluation_spec import EvaluationSpec
from workflows.labels import LabelSpec
from workflows.pairs import PairsSpec
from workflows.shape_shards import ShapesSpec
from workflows.train_spec import TrainSpec

TAKEN = (
    *("cascade", "data", "evaluation", "evaluation.new", "mark", "mlartifacts", "mlflow.db"),
    *("metrics.jsonl", "metrics.run", "metrics.sent", "seconds.json", "summary.json", "run.yaml"),
    *("endpoint.json", "endpoint.log", "cascade.json", "manifest.json", "README.md", "report.html"),
    *("embeddings", "report", "total"),
)
"""Names that no stage may have: a run or a cascade keeps something else in its directory under each of them,
or, for the last three, in its seconds.json."""
MADE_HERE = ("raw/*.tar",)
"""Stands for the shards in a run that makes its own (`shapes`)."""
RECORDED = "evaluation-"
"""Prefix of the names of the evaluations that `ddiff eval --record` keeps."""


class RunSpec(Spec):
    """Everything from raw pairs to a judged cascade."""

    kind: Literal["run"] = "run"
    name: SafeName
    """Its directory under DDIFF_STORAGE (`runs`), and what MLflow calls it."""
    shapes: ShapesSpec | None = None
    """The embedded world to write first; the run then knows its shards, and sets pairs.destination."""
    pairs: PairsSpec
    stages: tuple[TrainSpec, ...]
    """In any order; each is trained after its parents."""
    at_once: int = Field(1, ge=1)
    """How many stages may train side by side, in the order of the list, each after its parents.  Each has
    its fixed share of the CPUs whether the others run or not, so on CPUs another number here changes the
    threads of a stage, and with them the last bits.  If there are too few GPUs for all, stages wait."""
    cascade: CascadeSpec
    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="after")
    def _made_here(self) -> "RunSpec":
        if self.shapes is not None and self.pairs.shards != MADE_HERE:
            named = redacted(", ".join(self.pairs.shards))
            raise ValueError(
                f"pairs.shards is {named}, but this run trains on data of its own making (shapes); to train"
                " on yours set shapes=null and pairs.destination"
            )
        if self.shapes is not None and self.evaluation.judge:
            raise ValueError("evaluation.judge is for data of yours; a run's own is judged by the oracle")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "RunSpec":
        names = [stage.name for stage in self.stages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two stages are named {min(twice)!r}")
        for name in names:
            if name in TAKEN or name.startswith(RECORDED):
                raise ValueError(f"a stage is named {name!r}, as a run names something else; rename it")
        for stage in self.stages:
            self.check_sizes(stage)
            self.check_lengths(stage)
        for hop in self.cascade.hops:
            for name in (hop.stage, *hop.guides.values()):
                if name not in names:
                    raise ValueError(f"cascade: no stage is named {name!r}; there are {', '.join(names)}")
            self.check_hop(hop)
        refuse_cascade(
            [(hop.stage, self.stage(hop.stage).stage) for hop in self.cascade.hops], self.cascade.image_size
        )
        self.check_embeddings()
        if self.cascade.context_length != self.pairs.context_length:
            raise ValueError(
                f"cascade.context_length is {self.cascade.context_length}, "
                f"pairs.context_length {self.pairs.context_length}; make them equal"
            )
        in_order(self.stages)
        return self

    @property
    def source(self) -> str:
        """What it trains on, for people."""
        return "the embedded world of shapes" if self.shapes else redacted(", ".join(self.pairs.shards))

    def check_sizes(self, stage: TrainSpec) -> None:
        """Check that the data holds the images that a stage sees, and those whose embeddings it is told.

        Raises:
            ValueError: They are prepared at other sizes.
        """
        sizes, by = self.pairs.sizes, stage.stage.embedded_by
        if (side := stage.stage.image_size) not in sizes:
            raise ValueError(
                f"stage {stage.name!r} trains on images of {side} px, but pairs.sizes is {sizes}; "
                "add it there"
            )
        if by is not None and by.size not in sizes:
            raise ValueError(
                f"stage {stage.name!r} is told embeddings of images of {by.size} px (embedded_at), "
                f"but pairs.sizes is {sizes}; add it there"
            )

    def check_lengths(self, stage: TrainSpec) -> None:
        """Check that captions are prepared at the length that a stage reads.

        Raises:
            ValueError: It reads more tokens, or fewer.
        """
        for field, length in stage.stage.tokens.items():
            if length != self.pairs.context_length:
                raise ValueError(
                    f"stage {stage.name!r} reads {length} tokens (stage.{field}), pairs.context_length is "
                    f"{self.pairs.context_length}; make them equal"
                )

    def check_embeddings(self) -> None:
        """Check that a cascade uses embeddings of one CLIP, and after a prior those of the kind it draws.

        The image size matters too: a CLIP embeds a thumbnail differently.

        Raises:
            ValueError: Some were told embeddings by another CLIP, or of images of another size.
        """
        told = [stage for stage in self.standing() if stage.stage.embedded_by is not None]
        for stage in told[1:]:
            refuse_other_clip(stage, told[0])
        prior: TrainSpec | None = None
        for hop in self.cascade.hops:
            stage = self.stage(hop.stage)
            if isinstance(stage.stage, LearnsEmbeddings):
                prior = stage
            elif prior is not None:
                refuse_other_images(f"hop {stage.name}", stage, prior)

    def standing(self) -> list[TrainSpec]:
        """The stages of the run that the cascade is made of: hops, guides, and what these stand on."""
        names = [name for hop in self.cascade.hops for name in (hop.stage, *hop.guides.values())]
        known = {stage.name: stage for stage in self.stages}
        for name in names:  # the list grows in the loop
            parents = known[name].parents
            wanted = [parent for role, parent in parents.items() if role != "start" and parent in known]
            names += [parent for parent in wanted if parent not in names]
        return [known[name] for name in dict.fromkeys(names)]

    def check_hop(self, hop: HopSpec) -> None:
        """Check, before anything is trained, that the stage and the guides of a hop can do what it asks.

        Raises:
            ValueError: They cannot.
        """
        kinds = {"classifier": "noised_classifier"}
        for role, name in hop.guides.items():
            kind, wanted = self.stage(name).stage.kind, kinds.get(role, role)
            if kind != wanted:
                raise ValueError(f"hop {hop.stage}: guide {role!r} is a {kind}, a {wanted} is needed")
        self.check_tower(hop)
        spec = self.stage(hop.stage).stage
        if isinstance(spec, LearnsEmbeddings):
            self.check_draft(hop)
        elif hop.how.draws != 1 or "draft" in hop.guides:
            raise ValueError(
                f"hop {hop.stage}: {spec.kind} chooses among no draws; leave how.draws and guides.draft out "
                "and give them to the prior"
            )
        if isinstance(spec, ConsistencySpec) != (hop.how.sampler == "consistency"):
            raise ValueError(
                f"cascade: hop {hop.stage!r} is a {spec.kind} and is sampled by {hop.how.sampler}; "
                "sampler consistency and stages of kind consistency need each other"
            )
        try:
            refuse_sampling(spec, hop.how, hop.guides)
            refuse_guides(spec, hop.how, {role: self.stage(name).stage for role, name in hop.guides.items()})
        except ValueError as error:
            raise ValueError(f"hop {hop.stage}: {error}") from None

    def check_draft(self, prior: HopSpec) -> None:
        """Check that a prior's draft was trained on embeddings of images of the same size as the prior.

        Raises:
            ValueError: The draft that judges a prior's draws was trained on others.
        """
        if (draft := prior.guides.get("draft")) is not None:
            what = f"hop {prior.stage}: its guide {draft!r}"
            refuse_other_images(what, self.stage(draft), self.stage(prior.stage))

    def check_tower(self, hop: HopSpec) -> None:
        """Check that a noised CLIP gets captions from the CLIP that it was trained with.

        Raises:
            ValueError: The guides name another one.
        """
        noised, named = hop.guides.get("noised_clip"), hop.guides.get("clip")
        if noised is None or named is None:
            return
        if (own := self.stage(noised).parents.get("clip")) != named:
            raise ValueError(
                f"hop {hop.stage}: guides.clip is {named!r}, but {noised!r} stands on clip {own!r}; name that"
            )

    @property
    def label(self) -> LabelSpec | None:
        """How the data name the classes that the cascade paints or is guided to; None: it knows none."""
        names = {name for hop in self.cascade.hops for name in hop.told_classes}
        return next((one.label for one in self.stages if one.name in names and one.label), None)

    def with_stages(self, stages: Sequence[TrainSpec]) -> "RunSpec":
        """The run with other stages, unchecked: parents and hops of the cascade may lie outside of it."""
        return self.model_construct(**(dict(self) | {"stages": tuple(stages)}))

    def stage(self, name: str) -> TrainSpec:
        """The stage of this name.

        Raises:
            ValueError: There is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(
            f"{self.name} has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}"
        )


def refuse_other_clip(told: TrainSpec, first: TrainSpec) -> None:
    """Raises ValueError unless two stages that are told embeddings get them from the same CLIP."""
    theirs, own = told.stage.embedded_by, first.stage.embedded_by
    assert theirs is not None
    assert own is not None
    if (heard := told.parents.get(theirs.role)) != (known := first.parents.get(own.role)):
        raise ValueError(
            f"{told.name!r} stands on clip {heard!r}, {first.name!r} on {known!r}; train both on one, "
            "named alike"
        )


def refuse_other_images(what: str, told: TrainSpec, prior: TrainSpec) -> None:
    """Raises ValueError unless a stage is told embeddings of images of the size that the prior learns."""
    theirs, own = told.stage.embedded_by, prior.stage.embedded_by
    if theirs is not None and own is not None and theirs.size != own.size:
        raise ValueError(
            f"{what} was told embeddings of images of {theirs.size} px, and {prior.name!r} draws those of "
            f"{own.size} px; make embedded_at of {told.name!r} and image_size of {prior.name!r} equal"
        )


def in_order(stages: tuple[TrainSpec, ...]) -> list[TrainSpec]:
    """Every stage after those it stands on; otherwise as they are listed.

    Raises:
        ValueError: Stages stand on each other in a circle.
    """
    waiting, done = list(stages), list[TrainSpec]()
    while waiting:
        left = {stage.name for stage in waiting}
        ready = next((stage for stage in waiting if not left & set(stage.parents.values())), None)
        if ready is None:
            raise ValueError(f"stages stand on each other in a circle: {', '.join(sorted(left))}")
        done.append(ready)
        waiting.remove(ready)
    return done
