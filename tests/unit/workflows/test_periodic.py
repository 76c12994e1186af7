"""What is done again and again: it is done once more at the end, and never hides why the end came."""

import errno
import threading

import pytest

from workflows.periodic import Periodically
from workflows.storage import StorageError

SELDOM_S = 3600.0


def away() -> None:
    raise StorageError("s3://bucket is away")


@pytest.mark.parametrize("failure", [away, lambda: (_ for _ in ()).throw(OSError(28, "no space"))])
def test_the_error_under_way_is_how_it_ended_though_the_last_time_fails_too(
    failure: object, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyError, match="the real end"), Periodically(failure, every_s=SELDOM_S):  # type: ignore[arg-type]
        raise KeyError("the real end")
    assert "that is not why it ends" in caplog.text


def test_without_an_error_under_way_the_last_failure_is_raised() -> None:
    with pytest.raises(StorageError, match="is away"), Periodically(away, every_s=SELDOM_S):
        pass


def test_the_last_time_comes_after_all_that_was_done_inside() -> None:
    written, sent = list[str](), list[str]()
    with Periodically(lambda: sent.append("".join(written)), every_s=SELDOM_S):
        written += ["a", "b"]
    assert sent == ["ab"]


def test_a_disk_that_is_full_for_a_moment_does_not_end_it() -> None:
    tried, again = list[int](), threading.Event()

    def act() -> None:
        tried.append(len(tried))
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "no space left on device")
        again.set()

    with Periodically(act, every_s=0.01, at_end=False):
        assert again.wait(30)
