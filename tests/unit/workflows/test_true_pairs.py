"""Captions that are held out are trained on by nobody, and those that judge are chosen among them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dd_core import sealed, text
from tests.own_data import caption, colour, own_data
from workflows import feed
from workflows.labels import LabelSpec
from workflows.pairs import HELD_OUT, PairsSpec, is_held_out
from workflows.prepare import how
from workflows.row_groups import DataError
from workflows.storage import Home
from workflows.true_pairs import chosen, true_pictures

SHARE = 0.25


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return own_data(tmp_path_factory.mktemp("own") / "held", pairs=160, held_out=SHARE, twice=40)


def table_of(data: Home) -> pa.Table:
    return pa.concat_tables([pq.read_table(url) for url in feed.prepared_files(data)])


def test_no_epoch_of_any_training_reads_a_caption_that_is_held_out(data: Home) -> None:
    wanted = feed.Wanted(8)
    order = feed.Order(feed.survey(feed.prepared_files(data), wanted), 0, wanted)
    share = feed.Share(0, order.rows, 1, 0, 1)
    tables = [table for task in feed.tasks(order, share, wanted) for table in feed.read(task, wanted)]
    read = {tuple(row) for table in tables for row in table["tokens"].to_pylist()}
    rows = table_of(data).select(["tokens", "caption", "reject"]).to_pylist()
    assert read == {tuple(row["tokens"]) for row in rows if not row["reject"]}
    held = {tuple(row["tokens"]) for row in rows if row["reject"] == HELD_OUT}
    assert held
    assert not read & held


def test_all_pairs_of_a_caption_are_on_one_side_whatever_shard_or_case(data: Home) -> None:
    marks: dict[str, set[str]] = {}
    for row in table_of(data).select(["caption", "reject"]).to_pylist():
        marks.setdefault(text.cleaned(row["caption"]), set()).add(row["reject"])
    assert all(len(found) == 1 for found in marks.values())
    assert {mark for found in marks.values() for mark in found} == {"", HELD_OUT}


def test_the_share_that_is_asked_for_is_held_out_and_a_larger_one_holds_out_more_of_the_same() -> None:
    captions = [f"caption {number}" for number in range(20_000)]
    held = {share: {one for one in captions if is_held_out(one, share)} for share in (0.0, 0.02, 0.1)}
    assert not held[0.0]
    assert held[0.02] < held[0.1]
    for share, found in held.items():
        assert len(found) / len(captions) == pytest.approx(share, abs=4 * np.sqrt(share / len(captions)))


def test_the_counts_add_up(data: Home) -> None:
    facts, rows = data.facts(sealed.MANIFEST), table_of(data)["reject"].to_pylist()
    assert (facts["kept"], facts["rejected"]) == (len(rows), 0)
    assert facts["held_out"] == rows.count(HELD_OUT) > 0
    for part in facts["parts"]:
        assert part["kept"] == sum(part["usable"]) + sum(part["held_out"])


def test_without_any_held_out_the_data_and_their_making_are_as_before_there_was_such_a_thing(
    tmp_path: Path,
) -> None:
    spec = PairsSpec(shards=("a",), destination="b")
    assert "held_out" not in how(spec)
    assert how(spec.but(held_out=0.1)) == how(spec) | {"held_out": 0.1}
    assert set(table_of(own_data(tmp_path / "all"))["reject"].to_pylist()) == {""}


def test_each_of_those_that_judge_has_the_label_of_its_pair_if_labels_are_wanted(data: Home) -> None:
    label = LabelSpec(path="red", classes=tuple(str(25 + 25 * shade) for shade in range(9)))
    plain, labelled = chosen(data, 12, seed=1), chosen(data, 12, seed=1, label=label)
    reds = [int(place.caption.lower().split()[1]) for place in labelled.places]
    assert [place.label for place in labelled.places] == [red // 25 - 1 for red in reds]
    assert len(set(reds)) > 1
    assert [place._replace(label=-1) for place in labelled.places] == list(plain.places)


def test_those_that_judge_are_held_out_differ_and_are_a_function_of_data_and_seed(data: Home) -> None:
    found = chosen(data, 12, seed=1)
    names = [place.caption for place in found.places]
    assert found.held_out
    assert all(is_held_out(name, SHARE) for name in names)
    assert len({text.cleaned(name) for name in names}) == len(names) == 12
    assert chosen(data, 12, seed=1) == found
    assert chosen(data, 12, seed=2) != found
    every = {name for name in map(caption, range(160)) if is_held_out(name, SHARE)}
    some = {text.cleaned(place.caption) for place in chosen(data, 1_000, seed=0).places}
    assert some == every


def test_where_none_are_held_out_it_says_so(tmp_path: Path) -> None:
    found = chosen(own_data(tmp_path / "seen"), 1_000, seed=0)
    assert not found.held_out
    assert {place.caption for place in found.places} == set(map(caption, range(80)))
    with pytest.raises(DataError, match="no two captions that differ"):
        chosen(own_data(tmp_path / "one", pairs=1, shards=1), 10, seed=0)


@pytest.mark.parametrize(("side", "size"), [(1, 8), (8, 8), (9, 16), (64, 16)])
def test_true_pictures_are_those_of_the_captions_at_the_size_that_is_asked_for(
    data: Home, side: int, size: int
) -> None:
    places = chosen(data, 8, seed=0).places
    for place, png in zip(places, true_pictures(data, places, side), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(png)))
        assert pixels.shape == (size, size, 3)
        number = next(n for n in range(160) if caption(n) == text.cleaned(place.caption))
        assert np.abs(pixels.astype(int) - colour(number)).max() <= 1
