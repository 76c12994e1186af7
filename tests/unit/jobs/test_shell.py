"""What every command takes: flags that hold for it and for the processes that it starts."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from jobs.cli import main
from jobs.shell import Manner


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command chooses is forgotten after its test."""
    for name in ("NO_COLOR", "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)


def coloured(console: Console) -> bool:
    with console.capture() as captured:
        console.print("[red]text[/red]")
    return "\x1b[31m" in captured.get()


@pytest.mark.parametrize("words", [*commands(main)], ids=" ".join)
def test_every_command_takes_the_flags_of_all(words: tuple[str, ...]) -> None:
    said = CliRunner().invoke(main, [*words, "--help"]).output
    for name in Manner._fields:
        assert f"--{name.removeprefix('as_').replace('_', '-')}" in said


def test_no_color_holds_for_the_command_and_what_it_starts() -> None:

    def console() -> Console:
        return Console(file=io.StringIO(), force_terminal=True)

    for flags, allowed in (([], True), (["--no-color"], False)):
        done = CliRunner().invoke(main, ["config", "recipes", *flags])
        assert done.exit_code == 0, done.output
        assert coloured(console()) is allowed
        assert (os.environ.get("RAY_COLOR_PREFIX") != "0") is allowed


def test_data_prepare_takes_them_beside_its_config(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.yaml")
    done = CliRunner().invoke(main, ["data", "prepare", "--config", gone, "--no-color"])
    assert "gone.yaml" in done.stderr
    assert "leave out" not in done.stderr
