"""The scheduler of a run, on random graphs: whose turn it is, how many at a time, and what a failure does."""

import signal
import threading
import time
from pathlib import Path
from queue import Queue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.side_by_side import side_by_side
from workflows.stopping import STOP, stopped_by_signals
from workflows.storage import Home

WAIT_S = 20.0
"""Only a fault waits so long."""


class Stop:
    """Notes that it was asked."""

    def __init__(self) -> None:
        self.asked, self.times, self.told = False, 0, threading.Event()

    def ask(self) -> None:
        self.asked, self.times = True, self.times + 1
        self.told.set()


class Steps:
    """Steps that begin when the scheduler says and end when the test says, at the latest with the test."""

    def __init__(self, parents: dict[str, list[str]], at_once: int) -> None:
        self.parents, self.at_once, self.stop = parents, at_once, Stop()
        self.begun: Queue[str] = Queue()
        self.ends: dict[str, Queue[BaseException | None]] = {name: Queue() for name in parents}
        self.result: dict[str, str] | BaseException | None = None
        self.thread = threading.Thread(target=self.schedule, daemon=True)
        self.thread.start()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        """A test that is broken off (hypothesis gives up examples) leaves no thread that complains later."""
        self.stop.ask()
        for end in self.ends.values():
            end.put(None)
        self.thread.join(WAIT_S)

    def schedule(self) -> None:
        try:
            self.result = side_by_side(self.parents, self.make, at_once=self.at_once, stop=self.stop)
        except BaseException as error:  # noqa: BLE001 looked at by the test
            self.result = error

    def make(self, name: str) -> str:
        self.begun.put(name)
        error = self.ends[name].get(timeout=WAIT_S)
        if error is not None:
            raise error
        return name.upper()

    def expect(self, names: set[str]) -> None:
        """Just these have begun since."""
        assert {self.begun.get(timeout=WAIT_S) for _ in names} == names

    def over(self) -> None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        assert self.begun.empty()  # nothing has begun that was not expected


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    """Steps in any order, each on some of those that come before it in another order, or on a stranger."""
    names = [f"s{number}" for number in range(draw(st.integers(1, 7)))]
    parents = {
        name: draw(st.lists(st.sampled_from([*names[:number], "elsewhere"]), unique=True, max_size=3))
        for number, name in enumerate(names)
    }
    return {name: parents[name] for name in draw(st.permutations(names))}


def turns(parents: dict[str, list[str]], begun: set[str], ended: set[str], free: int) -> set[str]:
    """Who begins now: the first of the list whose parents have ended."""
    missing = parents.keys() - ended
    able = [name for name in parents if name not in begun and not missing & {*parents[name]}]
    return set(able[:free])


@settings(max_examples=60, deadline=None)
@given(parents=graphs(), at_once=st.integers(1, 4), data=st.data())
def test_every_step_runs_once_after_its_parents_in_the_order_of_the_list_and_so_many_at_a_time(
    parents: dict[str, list[str]], at_once: int, data: st.DataObject
) -> None:
    with Steps(parents, at_once) as steps:
        begun, ended = set[str](), set[str]()
        while len(ended) < len(parents):
            now = turns(parents, begun, ended, at_once - len(begun - ended))
            steps.expect(now)
            begun |= now
            one = data.draw(st.sampled_from(sorted(begun - ended)))
            steps.ends[one].put(None)
            ended.add(one)
        steps.over()
        assert steps.result == {name: name.upper() for name in parents}
        assert list(steps.result) == list(parents)
        assert not steps.stop.asked


@settings(max_examples=60, deadline=None)
@given(parents=graphs(), at_once=st.integers(1, 4), data=st.data())
def test_the_first_failure_begins_nothing_more_tells_the_others_once_and_is_raised(
    parents: dict[str, list[str]], at_once: int, data: st.DataObject
) -> None:
    with Steps(parents, at_once) as steps:
        begun, ended, bad = set[str](), set[str](), data.draw(st.sampled_from(sorted(parents)))
        while True:
            now = turns(parents, begun, ended, at_once - len(begun - ended))
            steps.expect(now)
            begun |= now
            one = data.draw(st.sampled_from(sorted(begun - ended)))
            ended.add(one)
            if one == bad:
                break
            steps.ends[one].put(None)
        steps.ends[bad].put(ValueError(bad))
        assert steps.stop.told.wait(WAIT_S)
        for number, one in enumerate(sorted(begun - ended)):  # those beside it end as they like
            steps.ends[one].put(RuntimeError("told to stop") if number % 2 else None)
        steps.over()
        assert isinstance(steps.result, ValueError)
        assert str(steps.result) == bad
        assert steps.stop.times == 1


def test_a_stop_asked_by_somebody_else_begins_nothing_more_and_hands_back_what_was_made() -> None:
    with Steps({"a": [], "b": ["a"], "c": []}, at_once=1) as steps:
        steps.expect({"a"})
        steps.stop.ask()
        steps.ends["a"].put(None)
        steps.over()
        assert steps.result == {"a": "A"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_tells_all_who_train_and_who_joins_later_and_is_gone_afterwards(
    number: signal.Signals, tmp_path: Path
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    first, late = Home.of(tmp_path / "first"), Home.of(tmp_path / "late")
    with stopped_by_signals() as stopping:
        with stopping.joined(first):
            assert not first.has(STOP)
            signal.raise_signal(number)
            while not first.has(STOP):
                time.sleep(0.01)
            with stopping.joined(late):
                assert late.has(STOP)
        assert stopping.asked
        assert not first.has(STOP)
        assert not late.has(STOP)
        signal.raise_signal(signal.SIGTERM)  # as often as anybody likes
        with pytest.raises(KeyboardInterrupt):  # who presses Ctrl-C again does not want to wait
            signal.raise_signal(signal.SIGINT)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
