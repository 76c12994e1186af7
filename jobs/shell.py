"""How every `ddiff` command speaks: --json, -v, -q, one line an error, an exit code.  Imports click alone."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType


def host(name: str) -> str:
    """Where to listen.  An empty host, as from a variable that is not set, would mean every address."""
    if not name.strip():
        raise click.BadParameter("no host is named; use 127.0.0.1, or 0.0.0.0 for every address")
    return name


class Directory(click.Path):
    """A directory on this machine, as a Path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            from workflows.addresses import redacted

            where = redacted(str(value))
            self.fail(
                f"{where} is an address, and this takes a directory; name one on this machine", param, ctx
            )
        return super().convert(value, param, ctx)


class Sealed(click.Path):
    """A sealed directory, as a Path, or the address of one in a store, as it was given; see `fetched`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


def fetched(place: Path | str) -> Path:
    """A directory as it is; of one in a store a verified copy on this machine, which is kept.

    Raises:
        sealed.SealError: It has no manifest, or no copy is whole.
        StorageError: The store is away or denies access.
    """
    if isinstance(place, Path):
        return place
    from workflows.storage import Home

    return Home.of(place).fetched()


DIRECTORY = Directory(file_okay=False, path_type=Path)
SEALED = Sealed(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
PORT = click.IntRange(1, 65535)
HOST = click.option(
    "--host", default="127.0.0.1", show_default=True, type=host, help="Where the endpoint listens."
)
RECIPE = click.option("--recipe", help="A recipe, such as demo; `ddiff config recipes` lists all.")
CONFIG = click.option("--config", "file", type=FILE, help="YAML as `ddiff config show` prints it.")
CHANGES = click.option(
    "--set", "changes", multiple=True, metavar="A.B=C", help="Change one value; may be repeated."
)
PRECISION = click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bf16", "fp32"]),
    help="Of the networks that paint; auto: bf16 where the device multiplies it, fp32 to remake pictures.",
)

ONCE_S = 3.0
"""Several SIGTERMs within this time count as one."""


class Manner(NamedTuple):
    """How a command speaks."""

    verbose: bool
    quiet: bool
    as_json: bool
    no_color: bool = False


class MisusedError(click.ClickException):
    """A command line that click cannot read, told as any other error.

    Args:
        error: What click says of it.
        as_json: Whether the words of the command ask for JSON.
    """

    exit_code = 2

    def __init__(self, error: click.UsageError, *, as_json: bool) -> None:
        super().__init__(error.format_message())
        self.as_json, self.ctx = as_json, error.ctx

    def show(self, file: IO[Any] | None = None) -> None:
        more = f" (`{self.ctx.command_path} --help` says more)" if self.ctx else ""
        tell(" ".join(self.message.split()) + more, self.exit_code, as_json=self.as_json)


class Read(click.Command):
    """Base of commands and groups: a command line that click cannot read is told as any other error."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with reading(args):
            return super().make_context(info_name, args, parent, **extra)


class Command(Read):
    """A command with --json, -v, -q and the like, whose every error is one line and an exit code."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [
            *super().get_params(ctx),
            click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."),
            click.Option(["-v", "--verbose"], is_flag=True, help="Say more; tracebacks."),
            click.Option(["-q", "--quiet"], is_flag=True, help="Say only what is wrong."),
            click.Option(["--no-color"], is_flag=True, help="No colours, as with NO_COLOR=1."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and turn an error into a line and an exit code."""
        manner = ctx.obj = Manner(**{name: ctx.params.pop(name) for name in Manner._fields})
        from jobs.environment import forbid_colours, prepare_environment
        from jobs.failures import StoppedError

        if manner.no_color:
            forbid_colours()
        prepare_environment()
        listen(manner)
        signal.signal(signal.SIGTERM, Stop())
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise MisusedError(error, as_json=manner.as_json) from error
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt, StoppedError) as error:  # noqa: BLE001 the one place where errors end
            fail(error, manner)


class Group(Read, click.Group):
    """A group whose commands are of class Command."""

    command_class = Command
    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        with reading(args):
            return super().resolve_command(ctx, args)


@contextlib.contextmanager
def reading(words: list[str]) -> Iterator[None]:
    """While inside, click reads the words of a command.

    Raises:
        MisusedError: It cannot read them.
    """
    as_json = "--json" in words  # click takes words from the list as it reads
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise MisusedError(error, as_json=as_json) from error


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """No garbage collection while inside: it takes a fifth of the time of imports that last seconds."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def listen(manner: Manner) -> None:
    """Log one line per event, on stderr, without the passwords of addresses."""
    from jobs.failures import Line

    level = logging.DEBUG if manner.verbose else logging.WARNING if manner.quiet else logging.INFO
    said = logging.StreamHandler()
    said.setFormatter(Line("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[said], force=True)
    for package in ("dd_core", "workflows", "serve", "jobs"):
        logging.getLogger(package).setLevel(level)


class Stop:
    """Handler of SIGTERM: end like an error, so that what was started is stopped.

    Ray signals every process of a job at once, and `jobs.attempts` passes its signal on to the command: two
    within ONCE_S count as one.  A later one cuts short what the command still does.
    """

    def __init__(self) -> None:
        self.heard = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        from jobs.failures import StoppedError

        if time.monotonic() - self.heard > ONCE_S:
            self.heard = time.monotonic()
            raise StoppedError("stopped by SIGTERM; run the same command again to continue")


def fail(error: BaseException, manner: Manner) -> NoReturn:
    """Say what is wrong and end with its code."""
    from jobs.failures import cause_of, code_of, line_of, trace_of

    if manner.verbose:
        click.echo(trace_of(error), err=True)
    error = cause_of(error)
    code = int(code_of(error))
    tell(line_of(error), code, as_json=manner.as_json)
    sys.exit(code)


def tell(line: str, code: int, *, as_json: bool) -> None:
    """What is wrong, on stderr."""
    click.echo(json.dumps({"error": line, "code": code}) if as_json else f"ddiff: {line}", err=True)


def say(text: str, *, err: bool = False) -> None:
    """Write lines; if the reader of the output is gone, end without a message, as on SIGPIPE."""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        from jobs.failures import Code

        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is still to be written goes nowhere
        sys.exit(Code.UNREAD)


def answer(facts: Mapping[str, Any], text: str = "") -> None:
    """The result of a command, on stdout."""
    manner: Manner = click.get_current_context().obj
    if manner.as_json:
        say(json.dumps(dict(facts), indent=2, default=str))
    else:
        say(text or "\n".join(f"{name}: {value}" for name, value in facts.items()))


def given(*names: str) -> list[str]:
    """Those of these parameters of the command that the user gave, as they are written: --out."""
    context = click.get_current_context()
    return [
        option.opts[0]
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]


def verbose() -> bool:
    """Whether -v was given."""
    return bool(click.get_current_context().obj.verbose)
