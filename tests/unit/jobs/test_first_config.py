"""What `ddiff init` writes: a configuration that can be used as it is, and explains itself."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from click.testing import CliRunner, Result
from pydantic import Field

from dd_core.spec import Spec
from jobs.cli import main
from jobs.config import resolve, run_spec, runs, shown
from jobs.explained import explained


class Inner(Spec):
    """A section.

    More than a line says.
    """

    steps: int = Field(3, ge=1, lt=9)
    """How often.  None would
    be endless."""
    way: Literal["there", "back"] | None = None
    silent: float = 1.0


class Outer(Spec):
    """All."""

    kind: Literal["outer"] = "outer"
    inner: Inner = Inner()
    """Said of the field."""
    list: tuple[Inner, ...] = (Inner(), Inner())
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    named: dict[str, Inner] = {}  # noqa: RUF012


EXPLAINED = """\
# from here
kind: outer
# Said of the field. A section.
inner:
  # How often. null would be endless. [at least 1, below 9]
  steps: 3
  # [there | back]
  way: null
  silent: 1.0
list:
- steps: 3
  way: back  # --set
  silent: 1.0
# [above 0, at most 1]
share: 0.5
named: {}
"""


def init(*words: str) -> Result:
    return CliRunner().invoke(main, ["init", *words])


def test_a_comment_says_what_a_field_is_where_it_comes_first() -> None:
    spec = Outer(list=(Inner(way="back"),))
    text = shown(spec, "from here").replace("way: back", "way: back  # --set")
    assert explained(text, spec) == EXPLAINED


@pytest.mark.parametrize("recipe", runs())
def test_comments_change_no_value_of_any_recipe_and_no_line_is_long(recipe: str) -> None:
    spec = run_spec(recipe)
    text = explained(shown(spec), spec)
    assert yaml.safe_load(text) == spec.model_dump(mode="json")
    assert [line for line in text.splitlines() if "# " in line and len(line) > 110] == []
    assert text.count("# Of one optimizer step, over all workers. [at least 1]") == 1


def test_what_is_written_is_read_back_and_is_a_run_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    done = init("--recipe", "smoke", "--out", str(out), "--set", "stages.base.budget.steps=7", "--json")
    assert done.exit_code == 0, done.output
    changes = ("name=mine", "stages.base.budget.steps=7")
    assert resolve(None, out) == run_spec("smoke", None, changes)
    facts = json.loads(done.stdout)
    assert facts["run"] == "mine"
    assert f"ddiff run --config {out} --dry-run" in facts["next"]
    text = out.read_text()
    assert "steps: 7  # --set" in text
    assert "# Optimizer steps. [at least 1]" in text
    assert "recipe smoke, unless a comment names another source" in text


def test_a_name_that_is_given_is_kept_and_one_of_digits_is_a_name(tmp_path: Path) -> None:
    assert init("--recipe", "smoke", "--out", str(tmp_path / "a.yaml"), "--set", "name=b").exit_code == 0
    assert run_spec(None, tmp_path / "a.yaml").name == "b"
    assert init("--recipe", "smoke", "--out", str(tmp_path / "2026.yaml")).exit_code == 0
    assert run_spec(None, tmp_path / "2026.yaml").name == "2026"


def test_it_says_what_to_run_next(tmp_path: Path) -> None:
    said = init("--out", str(tmp_path / "mine.yaml")).stdout
    for command in (
        f"ddiff config diff demo {tmp_path}/mine.yaml",
        f"ddiff run --config {tmp_path}/mine.yaml ",
    ):
        assert f"\n  {command}" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "there.yaml"], "there.yaml is there already; name another file with --out, or delete it"),
        (["--out", "mine.json"], "--out mine.json: let its name end in .yaml"),
        (["--recipe", "demmo"], "no recipe 'demmo'; did you mean 'demo'?"),
        (["--recipe", "smoke.base"], "smoke.base is of kind 'train'; this command needs kind 'run'"),
        (["--out", "no/mine.yaml"], "no/mine.yaml: No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_said_and_nothing_is_lost(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("kept")
    done = init(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert Path("there.yaml").read_text() == "kept"
