"""A cascade of the autoregressive prior and a consistency model: sealed, opened, served and painted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core import bundle, embeddings
from dd_core.cascade import CascadeSpec, CascadeState, HopSpec, run
from dd_core.nets.code_prior import CodePrior, CodePriorSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, build_stage
from dd_core.stages.autoregressive_prior import AutoregressivePriorSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from jobs.order import Order
from jobs.sample import paint
from tests.unit.dd_core.test_chain import EDM, trained
from tests.unit.serve.test_engine import all_of, served
from tests.unit.serve.tiny import STAGES

PRIOR = AutoregressivePriorSpec(
    net=CodePriorSpec(
        width=16,
        layers=1,
        head_width=8,
        text_width=16,
        embedding_width=16,
        context_length=12,
        axes=4,
        buckets=16,
    )
)
JUMPS = SamplingSpec(sampler="consistency", num_steps=2, guidance_scale=1.0)
CASCADE = CascadeSpec(
    name="few",
    hops=(
        HopSpec(stage="written", how=SamplingSpec(guidance_scale=2.0, draws=2)),
        HopSpec(stage="jumps", how=JUMPS, follows_request=True),
    ),
    context_length=12,
    image_size=16,
)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("few")
    base = STAGES["base"]
    assert isinstance(base, BaseSpec)
    specs: dict[str, tuple[StageSpec, tuple[str, ...]]] = {
        "clip": (STAGES["clip"], ()),
        "base": (base, ("clip",)),
        "jumps": (ConsistencySpec(base=base), ("clip", "base")),
        "written": (PRIOR, ("clip",)),
    }
    torch.manual_seed(0)
    trained: dict[str, Trained] = {}
    digests: dict[str, str] = {}
    for name, (spec, parents) in specs.items():
        model = build_stage(spec, {role: trained[role] for role in parents}).model
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        if isinstance(model, CodePrior):
            seen = torch.nn.functional.normalize(torch.randn(100, 16), dim=-1)
            model.measure(embeddings.fit_pca(seen, 4), torch.linspace(-0.5, 0.5, 100))
        trained[name] = Trained(spec, model.state_dict())
        mine = {role: digests[role] for role in parents}
        digests[name] = bundle.save(directory / name, spec, model.state_dict(), parents=mine, facts={})
    bundle.save_cascade(
        directory / "cascade", CASCADE, {name: directory / name for name in specs}, card="few"
    )
    return directory / "cascade"


def images_of(states: list[CascadeState]) -> list[Tensor | None]:
    return [one.image_embedding if one.image is None else one.image for one in states]


def test_the_engine_serves_either_hop_as_it_runs_alone(cascade: Path) -> None:
    opened = bundle.load_cascade(cascade)
    asked = [CascadeState(seeds=[seed], tokens=torch.full((1, 12), 5 + seed)) for seed in (1, 2, 3)]
    for hop, spec in zip(opened.hops, CASCADE.hops, strict=True):
        together = served(
            hop, lambda engine, how=spec.how: all_of(engine, *((one, how) for one in asked)), shared=False
        )
        alone = [run(hop, one, spec.how) for one in asked]
        for one, other in zip(images_of(together), images_of(alone), strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


def test_it_paints_follows_the_steps_of_a_request_and_ranks(cascade: Path, tmp_path: Path) -> None:
    two = paint(Order("a star", images=2), cascade, tmp_path / "two")
    one = paint(Order("a star", images=2, steps=1), cascade, tmp_path / "one")
    assert [a.path.read_bytes() == b.path.read_bytes() for a, b in zip(two, one, strict=True)] == [False] * 2
    again = paint(Order("a star", images=2), cascade, tmp_path / "again")
    assert [a.path.read_bytes() for a in two] == [a.path.read_bytes() for a in again]
    assert len(paint(Order("a star", images=3, keep=1), cascade, tmp_path / "best")) == 1


def test_a_consistency_model_of_classes_paints_the_class_that_it_is_asked_for(tmp_path: Path) -> None:
    spec = ConsistencySpec(base=EDM, teacher=TeacherSpec(guidance_scale=1.0))
    bundle.save(tmp_path / "jumps", spec, trained(EDM).weights, parents={}, facts={})
    cascade = CascadeSpec(
        name="classes", hops=(HopSpec(stage="jumps", how=JUMPS),), context_length=12, image_size=16
    )
    bundle.save_cascade(tmp_path / "cascade", cascade, {"jumps": tmp_path / "jumps"}, card="classes")

    def painted(label: int | None) -> bytes:
        (done,) = paint(Order("x", label=label), tmp_path / "cascade", tmp_path / f"class_{label}")
        return done.path.read_bytes()

    assert len({painted(label) for label in range(3)}) == 3
    with pytest.raises(ValueError, match="classes are 0 to 2"):
        painted(3)
    with pytest.raises(ValueError, match="give a label"):
        painted(None)
