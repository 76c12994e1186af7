"""What `ddiff config show` says of where values come from, and that its comments change none of them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jobs.cli import main
from jobs.config import RECIPES, recipes_in, resolve, shown, traced
from jobs.origins import Origin, Place, commented, source_of, steps, unsaid

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], include_characters="\n"))
SCALARS = st.none() | st.booleans() | st.integers() | TEXT | st.sampled_from(["# no", "a: b", "1e-3", "- a"])
FIELDS = st.dictionaries(
    TEXT,
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8),
    min_size=1,
    max_size=4,
)
ALL = [f"{file.stem}.{name}" for file in sorted(RECIPES.glob("[a-z]*.py")) for name in recipes_in(file.stem)]


def said(text: str) -> dict[str, str]:
    """The comments of a configuration after its first line, by what they stand behind."""
    lines = (line.partition("  # ") for line in text.splitlines()[1:])
    return {value.strip(" "): source for value, mark, source in lines if mark}


def show(*words: str) -> str:
    done = CliRunner().invoke(main, ["config", "show", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def places(fields: Any, place: Place = ()) -> list[Place]:
    """Every place there is."""
    return [place, *(one for step, inner in steps(fields) for one in places(inner, (*place, step)))]


@given(FIELDS, st.data())
def test_comments_change_no_value(fields: dict[str, Any], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(places(fields)[1:]), unique=True, min_size=1))
    text = commented(fields, [Origin(place, f"source {n}") for n, place in enumerate(chosen)])
    assert yaml.safe_load(text) == fields
    assert re.search(r"  # source \d+$", text, re.MULTILINE)


def test_a_comment_stands_at_the_end_of_its_value_or_before_what_the_value_holds() -> None:
    fields = {
        "plain": 3,
        "lines": "one\n# two",
        "folded": " ".join(["word:"] * 30),
        "none": [],
        "list": [{"lines": "a\n\nb", "c": 1}, "x", ["y"], {}],
        "inside": {"value": 1, "other": 2},
    }
    set_at = [("plain",), ("lines",), ("folded",), ("none",), *(("list", n) for n in range(4))]
    origins = [Origin(place, str(n)) for n, place in enumerate([*set_at, ("inside",), ("inside", "other")])]
    assert [line for line in commented(fields, origins).splitlines() if "  # " in line] == [
        "plain: 3  # 0",
        "  # two'  # 1",
        "  word: word: word:'  # 2",
        "none: []  # 3",
        "-  # 4",
        "- x  # 5",
        "-  # 6",
        "- {}  # 7",
        "inside:  # 8",
        "  other: 2  # 9",
    ]
    assert yaml.safe_load(commented(fields, origins)) == fields


def test_the_last_origin_counts_and_holds_for_what_is_inside() -> None:
    origins = [Origin(("a", "b"), "first"), Origin(("a",), "second"), Origin(("a", "c"), "third")]
    assert source_of(("a", "b"), origins) == "second"
    assert source_of(("a", "c", 0), origins) == "third"
    assert source_of(("b",), origins) == ""
    text = commented({"a": {"b": 1, "c": [2]}, "b": 3}, origins)
    assert text == "a:  # second\n  b: 1\n  c:  # third\n  - 2\nb: 3\n"


def test_what_the_fields_do_not_name_is_found_at_its_outermost() -> None:
    whole = {"a": [{"b": 1, "c": 2}, {"b": 3, "c": 4}], "d": {"e": {"f": 5}}, "g": None}
    assert list(unsaid({"a": [{"b": 1}, {"c": 4, "b": 3}], "g": None}, whole)) == [("a", 0, "c"), ("d",)]
    assert list(unsaid(whole, whole)) == []


@pytest.mark.parametrize("recipe", ALL)
def test_a_recipe_has_no_comment_but_its_name_and_can_be_fed_back(recipe: str, tmp_path: Path) -> None:
    text = show("--recipe", recipe)
    assert re.findall("#.*", text) == [f"# recipe {recipe}, unless a comment names another source"]
    (tmp_path / "run.yaml").write_text(text)
    assert resolve(None, tmp_path / "run.yaml") == resolve(recipe)


@pytest.mark.parametrize(
    ("recipe", "changes", "comments"),
    [
        ("demo", ["stages.base.budget.steps=10"], {"steps: 10": "--set"}),
        ("demo", ["stages.base.budget.steps=120"], {"steps: 120": "--set"}),  # which it is without
        (
            "demo",
            ["stages.0.seed=7", "cascade.hops.prior.how.draws=9"],
            {"seed: 7": "--set", "draws: 9": "--set"},
        ),
        ("demo", ["name=mine"], {"name: mine": "--set name"}),  # the cascade's, which stands below the run's
        ("demo", ["name=mine", "cascade.name=mine"], {"name: mine": "--set"}),
        ("demo", ["pairs.sizes=[64, 256, 512]"], {"sizes:": "--set"}),
        ("demo", ["stages.base.samples.prompts=['a # b', \"c\\n\\nd: e\"]"], {"prompts:": "--set"}),
        ("demo", ["stages.base.parents.start=runs/a#b/c"], {"start: runs/a#b/c": "--set"}),
        ("smoke.base", ["budget={steps: 5, checkpoint_every: 5}"], {"budget:": "--set"}),
        ("smoke.base", ["budget={steps: 5, checkpoint_every: 5}", "budget.steps=6"], {"budget:": "--set"}),
        (
            "smoke.base",
            ["label.path=json:a", "label.classes=[a, b]"],
            {"path: json:a": "--set", "classes:": "--set"},
        ),
        (  # what was null in the recipe, so that the rest of it comes from elsewhere, too
            "smoke.base",
            ["samples.how.sampler=heun", "samples.how.churn.amount=1"],
            {"sampler: heun": "--set", "amount: 1.0": "--set"}
            | {"low: 0.05": "default", "high: 50.0": "default", "noise: 1.003": "default"},
        ),
    ],
)
def test_what_a_flag_has_set_says_so_and_nothing_else_does(
    recipe: str, changes: Sequence[str], comments: dict[str, str], tmp_path: Path
) -> None:
    text = show("--recipe", recipe, *(word for change in changes for word in ("--set", change)))
    assert said(text) == comments
    (tmp_path / "run.yaml").write_text(text)
    assert resolve(None, tmp_path / "run.yaml") == resolve(recipe, None, changes)


def test_only_the_member_that_is_named_has_the_comment() -> None:
    lines = show("--recipe", "demo", "--set", "stages.base.budget.steps=120").splitlines()
    before = lines[: next(number for number, line in enumerate(lines) if line.endswith("# --set"))]
    assert [line for line in before if re.fullmatch("  name: .*", line)][-1] == "  name: base"


def test_a_file_is_named_above_and_what_it_leaves_out_is_a_default(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(shown(resolve("smoke")))
    text = show("--config", str(mine), "--set", "stages.base.budget.steps=11")
    assert text.startswith(f"# {mine}, unless a comment names another source\n")
    assert said(text) == {"steps: 11": "--set"}
    mine.write_text(
        "kind: pairs\nshards: [a.tar]\ndestination: b\nsizes: [64]\nlimits:\n  member_bytes: 100\n"
    )
    text = show("--config", str(mine), "--set", "held_out=0.5")
    assert {"held_out: 0.5", "suffixes:", "caption: txt"} <= said(text).keys()
    assert said(text)["held_out: 0.5"] == "--set"
    assert {said(text)[value] for value in said(text).keys() - {"held_out: 0.5"}} == {"default"}
    assert not {"shards:", "destination: b", "sizes:", "limits:", "member_bytes: 100"} & said(text).keys()
    (tmp_path / "shown.yaml").write_text(text)
    assert resolve(None, tmp_path / "shown.yaml") == resolve(None, mine, ["held_out=0.5"])


def test_a_flag_beats_what_it_was_set_to_before_within_a_whole_that_a_file_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: pairs\nshards: [a.tar]\ndestination: b\nsizes: [64]\n")
    origins = traced(None, tmp_path / "mine.yaml", ["limits.member_bytes=1", "limits.member_bytes=2"]).origins
    assert source_of(("limits", "member_bytes"), origins) == "--set"
    assert source_of(("limits", "suffixes"), origins) == "default"
    assert source_of(("shards",), origins) == ""


def test_a_name_of_several_lines_stays_a_comment() -> None:
    assert shown(resolve("smoke.base"), "a\nb").startswith("# a b\nkind: train\n")
