"""The scheduler of a run, on random graphs: whose turn it is, how many at a time, and what a failure does."""

import os
import signal
import threading
from queue import Queue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.side_by_side import side_by_side

WAIT_S = 30.0
"""Only a fault waits so long."""


class Stop:
    """Notes that it was asked."""

    def __init__(self) -> None:
        self.asked, self.times = False, 0

    def ask(self) -> None:
        self.asked, self.times = True, self.times + 1


class Steps:
    """Steps that begin when the scheduler says and end when the test says."""

    def __init__(self, parents: dict[str, list[str]], at_once: int) -> None:
        self.parents, self.at_once, self.stop = parents, at_once, Stop()
        self.begun: Queue[str] = Queue()
        self.ends: dict[str, Queue[BaseException | None]] = {name: Queue() for name in parents}
        self.result: dict[str, str] | BaseException | None = None
        self.thread = threading.Thread(target=self.schedule, daemon=True)
        self.thread.start()

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
    able = [
        name
        for name in parents
        if name not in begun and all(p in ended or p not in parents for p in parents[name])
    ]
    return set(able[:free])


@settings(max_examples=60, deadline=None)
@given(parents=graphs(), at_once=st.integers(1, 4), data=st.data())
def test_every_step_runs_once_after_its_parents_in_the_order_of_the_list_and_so_many_at_a_time(
    parents: dict[str, list[str]], at_once: int, data: st.DataObject
) -> None:
    steps = Steps(parents, at_once)
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
    steps = Steps(parents, at_once)
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
    for number, one in enumerate(sorted(begun - ended)):  # those beside it end as they like
        steps.ends[one].put(RuntimeError("told to stop") if number % 2 else None)
    steps.over()
    assert isinstance(steps.result, ValueError)
    assert str(steps.result) == bad
    assert steps.stop.times == 1


def test_a_stop_asked_by_somebody_else_begins_nothing_more_and_hands_back_what_was_made() -> None:
    steps = Steps({"a": [], "b": ["a"], "c": []}, at_once=1)
    steps.expect({"a"})
    steps.stop.ask()
    steps.ends["a"].put(None)
    steps.over()
    assert steps.result == {"a": "A"}


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_tells_those_that_run_and_a_second_one_does_not_wait_for_them(times: int) -> None:
    stop, running, release = Stop(), threading.Event(), threading.Event()
    ended = []

    def make(name: str) -> str:
        running.set()
        assert release.wait(WAIT_S)
        ended.append(name)
        return name

    def interrupt() -> None:
        running.wait(WAIT_S)
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.asked:
            threading.Event().wait(0.01)
        if times == 2:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            release.set()

    hand = threading.Thread(target=interrupt)
    hand.start()
    with pytest.raises(KeyboardInterrupt):
        side_by_side({"a": [], "b": []}, make, at_once=1, stop=stop)
    hand.join()
    assert ended == (["a"] if times == 1 else [])
    release.set()
