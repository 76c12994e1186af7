"""Failures: every kind has its code, and is said in one line."""

import errno
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dd_core.sealed import AbsentError, SealError
from dd_core.training import DataEndedError, DivergedError
from jobs import shell
from jobs.config import ConfigError
from jobs.doctor import findings
from jobs.failures import (
    Code,
    JobFailedError,
    PortTakenError,
    StoppedError,
    cause_of,
    code_elsewhere,
    code_of,
    line_of,
    trace_of,
)
from jobs.shell import Manner, listen
from workflows.census import TooManyRejectsError
from workflows.decode import carefully_decoded
from workflows.evaluation_spec import EvaluationSpec
from workflows.files import DamagedError, MissingShardError, ShardFile, insistently
from workflows.fit import TrainingError
from workflows.prepare import DestinationError
from workflows.registry import Registry
from workflows.row_groups import DataError
from workflows.storage import AddressError, StorageError, said
from workflows.training import PreemptedError

CODES = [
    (ConfigError("x"), 2),
    (ValueError("x"), 2),
    (DestinationError("x"), 2),
    (PortTakenError("x"), 2),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
    (FileExistsError(errno.EEXIST, "File exists", "x"), 2),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 2),
    (OSError(errno.EROFS, "Read-only file system", "x"), 2),
    (OSError(errno.EIO, "Input/output error", "x"), 70),
    (MissingShardError("x"), 3),
    (DamagedError("x"), 3),
    (TooManyRejectsError("x"), 3),
    (DataEndedError("x"), 3),
    (DataError("x"), 3),
    (SealError("x"), 4),
    (AbsentError("x"), 2),
    (DivergedError("x"), 5),
    (PreemptedError("x"), 6),
    (StoppedError("x"), 6),
    (KeyboardInterrupt(), 6),
    (TrainingError("x"), 70),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 70),
    (StorageError("x"), 70),
    (AddressError("x"), 2),
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


def test_a_value_that_a_spec_refuses_is_said_without_the_frame_of_pydantic() -> None:
    with pytest.raises(ValueError, match="captions") as refused:
        EvaluationSpec(captions=2)
    assert line_of(refused.value) == "captions: Input should be greater than or equal to 4"
    assert code_of(refused.value) == 2


def test_no_line_names_the_password_of_an_address() -> None:
    line = line_of(ValueError("http://me:hunter2@mlflow:5000 does not answer; s3://bucket/a@b is well"))
    assert line == "http://mlflow:5000 does not answer; s3://bucket/a@b is well"
    cut = line_of(RuntimeError("x" * 285 + " http://me:hunter2@mlflow"))
    assert "hunter2" not in cut
    assert "http://mlf" in cut


def test_a_place_that_is_shut_is_said_with_what_to_do() -> None:
    line = line_of(PermissionError(errno.EACCES, "Permission denied", "/data/out"))
    assert line == "/data/out: Permission denied; name another place, or let this account use it"


def test_neither_does_a_traceback_or_a_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    signed = "https://me:hunter2@host/a.tar?X-Amz-Signature=hunter3"
    try:
        raise ValueError(signed)
    except ValueError as error:
        inner = RuntimeError("outer")
        inner.__cause__ = error
        trace = trace_of(inner)
    listen(Manner(verbose=True, quiet=False, as_json=False))
    logging.getLogger("jobs.shell").warning("%s is away", signed)
    said = trace + capsys.readouterr().err
    assert said.count("https://host/a.tar") == 2, said
    assert "hunter" not in said


def test_a_store_that_is_away_is_said_in_its_own_line() -> None:
    assert line_of(StorageError("s3://bucket/a: timed out; check it")) == "s3://bucket/a: timed out; check it"


ENDED = [(2, 2), (3, 3), (5, 5), (6, 6), (0, 70), (1, 70), (137, 70), (None, 70)]


@pytest.mark.parametrize(("status", "code"), ENDED)
def test_what_fails_elsewhere_with_a_code_of_ours_has_it_here(status: int | None, code: int) -> None:
    assert code_of(JobFailedError("smoke.1 has failed", code_elsewhere(status))) == code


def test_an_internal_error_says_its_kind_and_how_to_see_more() -> None:
    line = line_of(RuntimeError("boom"))
    assert line.startswith("RuntimeError: boom")
    assert "-v" in line
    assert Code.INTERNAL == 70


def sigterm(*_: Any, **__: Any) -> Any:
    """What is asked when SIGTERM comes."""
    signal.raise_signal(signal.SIGTERM)


def in_a_store(_: Path) -> None:
    with said("s3://bucket/runs"):
        sigterm()


def in_the_registry(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    registry.client.log_metric = sigterm
    registry.probe("ddiff")


AT_WORK = {
    "a check of doctor": lambda _: list(findings("storage", sigterm)),
    "an image of unknown origin": lambda _: carefully_decoded(b"", 8, 64),
    "a question to a store": lambda _: insistently(sigterm, "x", final=lambda _: False),
    "a read of a shard": lambda place: ShardFile(str(place / "a.tar")).read(1),
    "a call of a store": in_a_store,
    "a probe of the registry": in_the_registry,
}


@pytest.mark.parametrize("work", AT_WORK.values(), ids=AT_WORK)
def test_sigterm_is_no_error_of_what_is_at_work_and_ends_it(
    work: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stoppable: None
) -> None:
    monkeypatch.setattr(Image, "open", sigterm)
    monkeypatch.setattr(ShardFile, "open", sigterm)
    with pytest.raises(StoppedError, match="stopped by SIGTERM"):
        work(tmp_path)


def test_sigterm_that_comes_twice_at_once_is_one_and_a_later_one_ends_what_is_still_done(
    monkeypatch: pytest.MonkeyPatch, stoppable: None
) -> None:
    monkeypatch.setattr(shell, "ONCE_S", 3600.0)
    with pytest.raises(StoppedError):
        sigterm()
    sigterm()  # as Ray tells each process of a job, and one of ours the other
    monkeypatch.setattr(shell, "ONCE_S", 0.0)
    with pytest.raises(StoppedError):
        sigterm()
