"""`ddiff bits`: the bound by its terms, told what the pictures have, over the last of them; or why not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from dd_core import bundle, images, likelihood, schedules
from dd_core.cascade import CascadeSpec, CascadeState, HopSpec
from dd_core.denoiser import Conditioning, Denoised
from dd_core.noise import SeededNoise
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.spec import Spec
from dd_core.stages import load_hop
from dd_core.stages.chain_bits import bits_of, refuse_bits, table_of
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_spec import ChainSpec
from jobs.bits import Asked, measured
from jobs.cli import main
from tests.own_data import own_data
from tests.prepared import write_prepared
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.students import SPEC as CONSISTENCY
from tests.unit.serve.tiny import STAGES
from workflows.held_out import pairs_to_measure_by
from workflows.labels import LabelSpec
from workflows.pairs import is_held_out

SHORT = ScheduleSpec(betas="cosine", num_timesteps=12)
IMPROVED = chains.IMPROVED.but(schedule=SHORT, rescaled_time=False)
CLASSES = chains.CLASSES.but(net=chains.plain(labels=4), schedule=SHORT)
CAPTIONED = chains.FROZEN.but(schedule=SHORT)
LABEL = {"path": "things.0.n", "classes": ["0", "1", "2"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared", rows=20)


def saved(place: Path, name: str, spec: ChainSpec, facts: dict[str, Any] | None = None) -> Path:
    made = chains.trained(spec)
    parents = {}
    if spec.needs:
        clip = chains.PARENTS["clip"]
        parents = {"clip": bundle.save(place / "clip", clip.spec, clip.weights, parents={}, facts={})}
    bundle.save(place / name, spec, made.weights, parents=parents, facts=facts or {})
    return place / name


def ddiff(path: Path, data: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["bits", str(path), "--data", str(data), *words])


def facts_of(path: Path, data: Path, *words: str) -> dict[str, Any]:
    done = ddiff(path, data, "--json", "-q", *words)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_hand(spec: ChainSpec, data: Path, count: int, variance: Any, cond: Any) -> likelihood.Bits:
    """The bound of the last pictures by the network itself, clipped."""
    hop = chains.hop(spec)
    assert isinstance(hop, ChainHop)
    pairs = pairs_to_measure_by(str(data), 16, count, LabelSpec(**LABEL)).pairs

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> Denoised:
        out = hop.model(x, sigma, cond(hop, pairs))
        return out._replace(x0=out.x0.clamp(-1, 1))

    noise, table = SeededNoise(list(range(count))), schedules.sigmas(SHORT)
    return likelihood.bits_per_dim(denoise, images.to_unit(pairs.image), table, noise, variance=variance)


def nothing(hop: ChainHop, pairs: Any) -> Conditioning:
    return Conditioning()


def classes(hop: ChainHop, pairs: Any) -> Conditioning:
    return Conditioning(level=hop.model.network.of_class(pairs.label))


def captions(hop: ChainHop, pairs: Any) -> Conditioning:
    assert hop.clip is not None
    return Conditioning(text=hop.clip.read(pairs.tokens).states)


@pytest.mark.parametrize(
    ("spec", "variance", "cond", "facts"),
    [
        (IMPROVED, "learned", nothing, {}),
        (CLASSES, "fixed_large", classes, {"label": LABEL}),
        (CAPTIONED, "fixed_large", captions, {}),
    ],
    ids=["learned", "classes", "captions"],
)
def test_the_bound_of_the_last_pictures_is_that_of_the_network_told_what_they_have(
    spec: ChainSpec, variance: str, cond: Any, facts: dict[str, Any], tmp_path: Path
) -> None:
    data = write_prepared(tmp_path / "prepared", rows=20)
    if spec is CAPTIONED:
        lengthened(data)
    bits = by_hand(spec, data, 5, variance, cond)
    found = facts_of(saved(tmp_path, "chain", spec, {"spec": facts}), data, "-n", "5")
    assert (found["images"], found["timesteps"], found["variance"]) == (5, 12, variance)
    parts = {
        "total": bits.total,
        "prior": bits.prior,
        "steps": bits.steps[:, 1:].sum(1),
        "decoder": bits.steps[:, 0],
    }
    for name, values in parts.items():
        term = found[f"{name}_bits"]
        assert term["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
        half = 1.959964 * float(values.double().std()) / math.sqrt(5)
        assert term["plus_minus"] == pytest.approx(half, rel=1e-3, abs=1e-6)
    means = [found[f"{name}_bits"]["mean"] for name in parts]
    assert means[0] == pytest.approx(sum(means[1:]), rel=1e-6)
    assert found["bits_by_timestep"] == pytest.approx(bits.steps.mean(0).tolist(), rel=1e-3)


def test_where_there_are_fewer_pictures_than_asked_for_progress_counts_those_there_are(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "jobs.bits"):
        found = measured(saved(tmp_path, "chain", IMPROVED), str(data), Asked(images=50, num_steps=2))
    assert 0 < found["images"] < 50
    assert caplog.messages[-1] == f"{found['images']} of {found['images']} pictures"


def lengthened(data: Path) -> None:
    """Its tokens, of 8 places, as 12."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    for path in data.glob("*.parquet"):
        table = pq.read_table(path)
        rows = [[*row, 0, 0, 0, 0] for row in table["tokens"].to_pylist()]
        at = table.column_names.index("tokens")
        pq.write_table(table.set_column(at, "tokens", pa.array(rows, pa.list_(pa.int32()))), path)


def test_the_bits_of_a_picture_do_not_depend_on_how_many_are_measured_with_it() -> None:
    hop = load_hop(chains.trained(IMPROVED), chains.PARENTS, device="cpu")
    assert isinstance(hop, ChainHop)
    x0 = images.to_unit(torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8))
    state = CascadeState([4, 5, 6], chains.told("", "", ""))
    one = CascadeState([5], chains.told(""))
    table = table_of(IMPROVED)
    together = bits_of(hop, x0, state, table, variance="learned")
    alone = bits_of(hop, x0[1:2], one, table, variance="learned")
    torch.testing.assert_close(together.steps[1:2], alone.steps, rtol=1e-3, atol=1e-5)


def test_of_a_chain_that_ends_in_noise_nothing_is_lost_before_its_first_step(
    data: Path, tmp_path: Path
) -> None:
    """The prior term is nil with cosine betas, and no timestep costs less than nothing."""
    found = facts_of(saved(tmp_path, "chain", IMPROVED), data, "-n", "2")
    assert 0 <= found["prior_bits"]["mean"] < 1e-3
    assert all(value >= -1e-6 for value in found["bits_by_timestep"])


def test_fewer_timesteps_are_evenly_spaced_from_the_first_to_the_last(data: Path, tmp_path: Path) -> None:
    path, table = saved(tmp_path, "chain", IMPROVED), schedules.sigmas(SHORT)
    assert torch.equal(table_of(IMPROVED, 2), table[[0, -1]])
    assert torch.equal(table_of(IMPROVED, 12), table)
    few, whole = (facts_of(path, data, "-n", "3", *words) for words in (("--steps", "4"), ()))
    assert (few["timesteps"], len(few["bits_by_timestep"])) == (4, 4)
    assert few["decoder_bits"] != few["total_bits"]
    assert few["prior_bits"] == whole["prior_bits"]


def test_a_run_and_a_cascade_are_measured_by_their_chain(data: Path, tmp_path: Path) -> None:
    saved(tmp_path, "one", IMPROVED)
    saved(tmp_path, "captioned", CAPTIONED)
    saved(tmp_path, "enlarging", chains.ENLARGING)
    how = SamplingSpec(sampler="ddim", num_steps=2, guidance_scale=1.0)

    def cascade(run: str, *stages: str) -> Path:
        spec = CascadeSpec(
            name=run,
            hops=tuple(HopSpec(stage=stage, how=how) for stage in stages),
            context_length=12,
            image_size=16,
        )
        bundles = {stage: tmp_path / stage for stage in (*stages, "clip")}
        bundle.save_cascade(tmp_path / run / "cascade", spec, bundles, card="")
        return tmp_path / run

    alone = facts_of(tmp_path / "one", data, "-n", "2")
    run = cascade("run", "one", "enlarging")
    for path in (run, run / "cascade", run / "cascade" / "one"):
        found = facts_of(path, data, "-n", "2")
        assert found["total_bits"] == alone["total_bits"]
    both = cascade("both", "one", "captioned")
    done = ddiff(both, data)
    assert done.exit_code == 2
    assert "more than one chain: one, captioned; name one with --stage" in done.stderr
    assert facts_of(both, data, "-n", "2", "--stage", "one")["total_bits"] == alone["total_bits"]
    done = ddiff(both, data, "--stage", "two")
    assert "has no hop 'two'; there are one, captioned" in done.stderr
    done = ddiff(cascade("none", "enlarging"), data)
    assert done.exit_code == 2
    assert (
        "enlarging: bits per dim are not defined for this chain: it is told the picture itself" in done.stderr
    )


def test_people_are_told_every_term_and_whether_the_pictures_were_learned_from(
    data: Path, tmp_path: Path
) -> None:
    digest = json.loads((data / "manifest.json").read_text())["digest"]
    done = ddiff(saved(tmp_path, "chain", IMPROVED, {"data": digest}), data, "-n", "3", "--steps", "3")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "3 pictures of" in lines[0]
    assert "3 timesteps, variance learned" in lines[0]
    assert [line.split("  ")[1].strip() for line in lines[1:5]] == [
        "bits per dim",
        "prior",
        "timesteps from 1",
        "decoder, 0",
    ]
    assert all("±" in line for line in lines[1:5])
    assert "it was trained on these very pictures" in lines[5]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (STAGES["base"], "a base has none; take a chain"),
        (STAGES["upsampler"], "an upsampler has none"),
        (CONSISTENCY, "a consistency has none"),
        (chains.EDM, "all noise levels (EDM) and has no timesteps"),
        (chains.LATENT, "it paints latents"),
        (chains.ENLARGING, "it is told the picture itself, smaller"),
        (chains.UNCLIP, "it is told an embedding of the picture itself"),
    ],
)
def test_where_the_bound_is_not_defined_that_is_said(spec: Spec, why: str) -> None:
    with pytest.raises(ValueError, match=r"bits per dim are") as error:
        refuse_bits(spec)
    assert why in str(error.value)


def test_what_the_data_or_the_chain_cannot_give_is_refused(data: Path, tmp_path: Path) -> None:
    fixed = saved(tmp_path, "fixed", chains.DDPM.but(schedule=SHORT))
    for path, words, said, code in (
        (fixed, ("--variance", "learned"), "does not learn its variance; take fixed_large or fixed_small", 2),
        (fixed, ("--steps", "13"), "13", 2),
        (fixed, ("--stage", "x"), "--stage is of a cascade", 2),
        (saved(tmp_path, "classes", CLASSES), (), "its bundle does not say where they are in the data", 2),
        (saved(tmp_path, "captioned", CAPTIONED), (), "captions of 8 tokens, but its CLIP reads 12", 2),
        (saved(tmp_path, "large", chains.DDPM.but(image_size=32)), (), "has no image32; prepare the data", 3),
    ):
        done = ddiff(path, data, *words)
        assert done.exit_code == code, done.output
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    done = ddiff(fixed, tmp_path / "absent")
    assert done.exit_code == 3


def test_the_last_usable_pairs_are_taken_across_files_in_their_order(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "prepared", files=2, rows=20, rejected=3)
    pairs, captions, held_out = pairs_to_measure_by(str(data), 16, 20, LabelSpec(**LABEL))
    numbers = [int(row[1]) - 1 for row in pairs.tokens]
    assert numbers == [17, 18, 19, *range(23, 40)]  # the first three of each file are rejects
    assert pairs.label is not None
    assert pairs.label.tolist() == [number % 3 for number in numbers]
    assert captions == [""] * 20
    assert not held_out
    assert len(pairs_to_measure_by(str(data), 16, 1000).pairs.tokens) == 34


def test_pairs_that_were_held_out_are_measured_by_before_all_others(tmp_path: Path) -> None:
    data = own_data(tmp_path / "prepared", held_out=0.3)
    found = pairs_to_measure_by(data.address, 16, 1000)
    assert found.held_out
    assert len(found.captions) == data.facts("manifest.json")["held_out"] > 0
    assert all(is_held_out(caption, 0.3) for caption in found.captions)
