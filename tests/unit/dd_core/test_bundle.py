"""Bundles and cascades: hash-linked, strict, and refused with the file named when anything is off."""

import json
from pathlib import Path

import pytest
import torch

from dd_core import bundle, sealed
from dd_core.cascade import CascadeSpec, HopSpec, run
from dd_core.samplers import SamplingSpec
from tests.unit.dd_core.test_stages import BASE, CLIP, DRAFT, PRIOR, asked, parents, stage

SPEC = CascadeSpec(
    name="tiny",
    hops=(HopSpec(stage="prior"), HopSpec(stage="base", follows_request=True)),
    context_length=12,
    image_size=16,
)


def stages(root: Path) -> dict[str, Path]:
    """Bundles of a CLIP, a prior, a draft and a base that stand on each other."""
    digests: dict[str, str] = {}
    for name, spec in (("clip", CLIP), ("prior", PRIOR), ("draft", DRAFT), ("base", BASE)):
        weights, roles = stage(spec).model.state_dict(), parents(spec)
        named = {role: digests[role] for role in roles}
        digests[name] = bundle.save(root / name, spec, weights, parents=named, facts={"step": 1})
    return {name: root / name for name in digests}


@pytest.fixture
def cascade(tmp_path: Path) -> Path:
    bundle.save_cascade(tmp_path / "cascade", SPEC, stages(tmp_path), card="# tiny")
    return tmp_path / "cascade"


def reseal(directory: Path) -> None:
    """A manifest that fits what is in the directory now."""
    body = json.loads((directory / sealed.MANIFEST).read_text())
    facts = {name: fact for name, fact in body.items() if name not in ("files", "digest")}
    (directory / sealed.MANIFEST).unlink()
    sealed.seal(directory, sealed.digests(directory), facts)


def test_a_bundle_round_trips_and_is_known_by_its_digest(tmp_path: Path) -> None:
    weights = stage(BASE).model.state_dict()
    digest = bundle.save(tmp_path / "b", BASE, weights, parents={"clip": "a" * 64}, facts={"step": 3})
    loaded = bundle.load(tmp_path / "b", digest=digest)
    assert (loaded.trained.spec, loaded.parents, loaded.facts["step"]) == (BASE, {"clip": "a" * 64}, 3)
    assert all(torch.equal(loaded.trained.weights[name], value) for name, value in weights.items())
    with pytest.raises(sealed.SealError, match="not bbbbbbbbbbbb as asked for"):
        bundle.load(tmp_path / "b", digest="b" * 64)


def test_a_spec_from_the_future_is_refused_by_file_and_name(tmp_path: Path) -> None:
    bundle.save(tmp_path / "b", CLIP, {"w": torch.zeros(1)}, parents={}, facts={})
    spec = json.loads((tmp_path / "b" / "spec.json").read_text())
    (tmp_path / "b" / "spec.json").write_text(json.dumps(spec | {"wings": 2}))
    reseal(tmp_path / "b")
    with pytest.raises(sealed.SealError, match=r"spec\.json: clip: ClipSpec has no field 'wings'"):
        bundle.load(tmp_path / "b")


def test_a_cascade_paints_what_its_stages_paint(cascade: Path) -> None:
    opened = bundle.load_cascade(cascade)
    state = asked([4], "a red circle")
    for hop in opened.hops:
        state = run(hop, state, SamplingSpec(num_steps=3, guidance_scale=2.0))
    assert state.image is not None
    assert state.image.shape == (1, 3, 16, 16)
    again = bundle.load_cascade(cascade, digest=opened.digest)
    assert again.spec == SPEC


def test_a_cascade_does_not_mix_trainings(tmp_path: Path) -> None:
    found = stages(tmp_path)
    other = bundle.save(tmp_path / "other", CLIP, {"w": torch.zeros(1)}, parents={}, facts={})
    assert other
    with pytest.raises(ValueError, match=r"was trained on clip .* not in this cascade"):
        bundle.save_cascade(tmp_path / "c", SPEC, found | {"clip": tmp_path / "other"}, card="")
    with pytest.raises(ValueError, match="hop 'base' has no bundle; there are clip, prior"):
        bundle.save_cascade(tmp_path / "c", SPEC, {n: found[n] for n in ("clip", "prior")}, card="")
    assert not (tmp_path / "c").exists()


def test_hops_that_speak_of_embeddings_by_different_clips_are_refused(tmp_path: Path) -> None:
    found = stages(tmp_path)
    other = bundle.save(tmp_path / "other", CLIP, {"w": torch.zeros(1)}, parents={}, facts={})
    named = sealed.verify(found["base"]).facts["parents"] | {"clip": other}
    bundle.save(found["base"], BASE, stage(BASE).model.state_dict(), parents=named, facts={"step": 1})
    with pytest.raises(ValueError, match=r"prior learned embeddings by clip \w{12}, base by \w{12}; train"):
        bundle.save_cascade(tmp_path / "c", SPEC, found | {"other": tmp_path / "other"}, card="")
    assert not (tmp_path / "c").exists()


def test_where_weights_began_is_no_part_of_a_cascade(tmp_path: Path) -> None:
    found = stages(tmp_path)
    named = sealed.verify(found["base"]).facts["parents"] | {"start": "a" * 64}
    bundle.save(found["base"], BASE, stage(BASE).model.state_dict(), parents=named, facts={"step": 1})
    digest = bundle.save_cascade(tmp_path / "cascade", SPEC, found, card="")
    assert bundle.load_cascade(tmp_path / "cascade").digest == digest


@pytest.mark.parametrize(
    "name", ["base/weights.safetensors", "cascade.json", "clip/spec.json", "clip/manifest.json"]
)
def test_a_flipped_bit_or_a_missing_file_is_refused_by_name(cascade: Path, name: str) -> None:
    whole = (cascade / name).read_bytes()
    (cascade / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 4]) + whole[-1:])
    with pytest.raises(sealed.SealError, match=f"{name}: sha256 is"):
        bundle.load_cascade(cascade)
    (cascade / name).unlink()
    with pytest.raises(sealed.SealError, match=f"{name} is missing; use an older one or a copy"):
        bundle.load_cascade(cascade)


def test_a_bundle_is_no_cascade(cascade: Path) -> None:
    with pytest.raises(sealed.AbsentError, match="base is no cascade; name a directory such as"):
        bundle.read_cascade(cascade / "base")


def test_a_cascade_that_is_made_again_replaces_the_old_one_whole(cascade: Path, tmp_path: Path) -> None:
    before = sealed.verify(cascade).digest
    cut = tmp_path / ".cascade.old" / "clip"  # of an earlier replacement, killed while it removed this
    cut.mkdir(parents=True)
    (cut / "weights.safetensors").write_bytes(b"cut")
    names = ("base", "clip", "draft", "prior")
    found = {name: tmp_path / name for name in names}
    after = bundle.save_cascade(cascade, SPEC.but(name="tinier"), found, card="# tinier")
    assert sealed.verify(cascade).digest == after != before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["cascade", *names])
