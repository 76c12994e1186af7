"""What went wrong, for the person and for the script: one line and one exit code for every error."""

import errno
import logging
import traceback
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from workflows.addresses import redacted

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

DISK = "the disk"
"""Named where a library does not say which file."""


class Code(IntEnum):
    """Exit codes of every `ddiff` command."""

    DONE = 0
    CONFIGURATION = 2
    DATA = 3
    CHECKPOINT = 4
    NOT_FINITE = 5
    PREEMPTED = 6
    INTERNAL = 70
    UNREAD = 141
    """A shell's code for SIGPIPE: the reader of the output is gone, as with `| head`."""


OF_TRAINING = {
    ("builtins", "FloatingPointError"): Code.NOT_FINITE,
    ("dd_core.training", "DivergedError"): Code.NOT_FINITE,
    ("dd_core.training", "DataEndedError"): Code.DATA,
    ("workflows.row_groups", "DataError"): Code.DATA,
    ("workflows.census", "TooManyRejectsError"): Code.DATA,
    ("workflows.training", "PreemptedError"): Code.PREEMPTED,
}
"""Module and name of an error -> its code; importing them takes seconds."""


class StoppedError(BaseException):
    """The process was told to end; what was finished is kept.

    Like KeyboardInterrupt it is no Exception: code that retries or records the errors of a store, a server
    or an image would catch it and go on.
    """


class JobFailedError(RuntimeError):
    """A job on a cluster has ended badly, or does not end; what it said has been shown.

    Args:
        message: Which job, and what to do.
        code: Of the job; a command that follows it ends with the same.
    """

    def __init__(self, message: str, code: Code = Code.INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class PortTakenError(RuntimeError):
    """Something else listens where the endpoint should."""


def code_of(error: BaseException) -> Code:
    """The exit code of an error; the modules named here are loaded already where one was raised."""
    from dd_core.sealed import AbsentError, SealError  # noqa: PLC0415 an error must not import torch
    from workflows.files import DamagedError, MissingShardError  # noqa: PLC0415

    match error:
        case StoppedError() | KeyboardInterrupt():
            return Code.PREEMPTED
        case SealError():
            return Code.CONFIGURATION if isinstance(error, AbsentError) else Code.CHECKPOINT
        case MissingShardError() | DamagedError():
            return Code.DATA
        case PortTakenError() | ValueError() | OSError() if mistaken(error):
            return Code.CONFIGURATION
        case ValueError() | OSError():
            return Code.INTERNAL
        case _:
            return error.code if isinstance(error, JobFailedError) else code_of_training(error)


def mistaken(error: Exception) -> bool:
    """Whether what was asked for is wrong: also a place that is not there, is of another kind, or is shut."""
    named = FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError
    return not away(error) and (not isinstance(error, OSError) or isinstance(error, named) or shut(error))


def shut(error: OSError) -> bool:
    """Whether the place must not be written to, or read, by this account."""
    return isinstance(error, PermissionError) or error.errno == errno.EROFS


def code_of_training(error: BaseException) -> Code:
    """The rest: errors of modules that a command which does not train has not loaded, nor loads for this."""
    kinds = [(kind.__module__, kind.__name__) for kind in type(error).__mro__]
    return next((code for kind, code in OF_TRAINING.items() if kind in kinds), Code.INTERNAL)


def code_elsewhere(status: int | None) -> Code:
    """The code of a command of ours that failed elsewhere with this status; INTERNAL for None or others."""
    return Code(status) if status in set(Code) - {Code.DONE} else Code.INTERNAL


def cause_of(error: BaseException) -> BaseException:
    """The error that a worker raised, out of the wrappers that Ray puts round it."""
    while (inner := getattr(error, "cause", None)) and isinstance(inner, BaseException):
        error = inner
    return error


def line_of(error: BaseException) -> str:
    """What, where and what to do, in one line without the passwords of addresses."""
    match error:
        case KeyboardInterrupt():
            return "stopped; run the same command again to continue"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            large = " for a file so large (`ulimit -f`)" if error.errno == errno.EFBIG else ""
            return no_space(f"{error.filename or DISK}{large}")
        case OSError() if error.filename:
            remedy = "; name another place, or let this account use it" if shut(error) else ""
            return redacted(f"{error.filename}: {error.strerror}{remedy}")
    text = redacted(" ".join(words_of(error).split())) or type(error).__name__
    if isinstance(error, JobFailedError) or away(error) or code_of(error) is not Code.INTERNAL:
        return text
    from workflows.outcome import disk_full  # noqa: PLC0415 seconds, for an internal error alone

    if disk_full(error):
        return no_space(DISK)
    return f"{type(error).__name__}: {text:.300}; run again with -v for the traceback"


def no_space(where: str) -> str:
    """The line for a full disk, or a quota that is used up."""
    return f"no space left on {redacted(where)}; free some and run the same command again to continue"


def away(error: BaseException) -> bool:
    """Whether the error is of a store that may come back, not of a wrong address."""
    from workflows.storage import AddressError, StorageError  # noqa: PLC0415 only where there is an error

    return isinstance(error, StorageError) and not isinstance(error, AddressError)


def words_of(error: BaseException, fields: Any = None, within: str = "") -> str:
    """The text of an error; for values that a spec refuses, which and why, without pydantic's frame.

    Args:
        error: Any.
        fields: The fields that were refused, to name the values as the user would.
        within: The path of these fields, put in front.
    """
    from pydantic import ValidationError  # noqa: PLC0415 the command line waits for it only where it fails

    if not isinstance(error, ValidationError):
        return str(error)
    told = []
    for one in error.errors():
        where = ".".join(filter(None, (within, place(fields, one["loc"]))))
        why = why_of(one)
        told.append(f"{where}: {why}" if where else why)
    return "; ".join(dict.fromkeys(told))


def why_of(error: "ErrorDetails") -> str:
    """What pydantic says of one value, as the user would; of fields that may be of several kinds, which."""
    context = error.get("ctx", {})
    match error["type"]:
        case "union_tag_not_found":
            return f"field {context['discriminator']} is missing, which says what it is"
        case "union_tag_invalid":
            return f"{context['discriminator']} is {context['tag']!r}, and may be {context['expected_tags']}"
        case _:
            return (
                error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, such as [a, b]")
            )


def label(item: Any, number: int) -> str:
    """What a member of a list is called: its name, its stage, or its number."""
    if isinstance(item, dict):
        return str(item.get("name") or item.get("stage") or number)
    return str(number)


def place(fields: Any, location: tuple[int | str, ...]) -> str:
    """A path as the user would write it: members by name, without the tags of unions.

    Args:
        fields: What was refused; None: not known, so the path is pydantic's.
        location: Of the value within them.
    """
    if fields is None:
        return ".".join(map(str, location))
    parts: list[str] = []
    for step in location:
        if isinstance(fields, list) and isinstance(step, int) and step < len(fields):
            parts.append(label(fields[step], step))
            fields = fields[step]
        elif isinstance(fields, dict) and step in fields:
            parts.append(str(step))
            fields = fields[step]
        elif step == location[-1] and not is_tag(fields, step):
            parts.append(str(step))
    return ".".join(parts)


def is_tag(fields: Any, step: int | str) -> bool:
    """Whether a step only says which member of a union was meant."""
    return isinstance(fields, dict) and step == fields.get("kind")


class Line(logging.Formatter):
    """Formatter of the log, without the passwords of addresses."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record, as others may see it."""
        return redacted(super().format(record))


def trace_of(error: BaseException) -> str:
    """The whole traceback, without the passwords of addresses too."""
    return redacted("".join(traceback.format_exception(error)))
