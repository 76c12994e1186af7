"""Failures: every kind has its code, and is said in one line."""

import errno

import pytest

from dd_core.sealed import SealError
from dd_core.training import DataEndedError, DivergedError
from jobs.config import ConfigError
from jobs.failures import Code, PortTakenError, StoppedError, cause_of, code_of, line_of
from workflows.feed import DataError
from workflows.files import DamagedError, MissingShardError
from workflows.pairs import TooManyRejectsError
from workflows.prepare import DestinationError
from workflows.training import PreemptedError, TrainingError

CODES = [
    (ConfigError("x"), 2),
    (ValueError("x"), 2),
    (DestinationError("x"), 2),
    (PortTakenError("x"), 2),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2),
    (MissingShardError("x"), 3),
    (DamagedError("x"), 3),
    (TooManyRejectsError("x"), 3),
    (DataEndedError("x"), 3),
    (DataError("x"), 3),
    (SealError("x"), 4),
    (DivergedError("x"), 5),
    (PreemptedError("x"), 6),
    (StoppedError("x"), 6),
    (KeyboardInterrupt(), 6),
    (TrainingError("x"), 70),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 70),
    (RuntimeError("x"), 70),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: type(value).__name__)
def test_every_error_has_the_code_that_scripts_rely_on(error: BaseException, code: int) -> None:
    assert code_of(error) == code


@pytest.mark.parametrize("error", [error for error, _ in CODES], ids=lambda error: type(error).__name__)
def test_every_error_is_one_line(error: BaseException) -> None:
    error.args = (*error.args[:-1], "first\nsecond") if error.args else ()
    assert "\n" not in line_of(error)
    assert line_of(error)


def test_what_ray_has_wrapped_is_taken_out() -> None:
    inner = SealError("damaged")
    wrapped, twice = RuntimeError("outer"), RuntimeError("outermost")
    wrapped.cause = inner  # type: ignore[attr-defined]
    twice.cause = wrapped  # type: ignore[attr-defined]
    assert cause_of(twice) is inner
    assert cause_of(inner) is inner


def test_an_internal_error_says_its_kind_and_how_to_see_more() -> None:
    line = line_of(RuntimeError("boom"))
    assert line.startswith("RuntimeError: boom")
    assert "-v" in line
    assert Code.INTERNAL == 70
