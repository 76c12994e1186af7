"""Links: what dies is asked again elsewhere, what is being replaced a little later, and neither for ever."""

import asyncio
import math
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError

from dd_core.cascade import CascadeState
from dd_core.samplers import SamplingSpec
from serve.engine import DeviceLostError, EngineDownError
from serve.links import ReplicaLink
from serve.painter import HopLostError

STATE = CascadeState(seeds=[1], tokens=torch.zeros(1, 12))
DEAD, DOWN, STRUCK = RayActorError(), EngineDownError("failed"), DeviceLostError("failed")


class Handle:
    """A deployment whose replicas give these answers, and then the state that they are handed."""

    def __init__(self, *answers: Exception) -> None:
        self.answers, self.advance = list(answers), self

    def remote(self, state: CascadeState, *_: Any) -> "asyncio.Future[CascadeState]":
        answer = asyncio.get_running_loop().create_future()
        if self.answers:
            answer.set_exception(self.answers.pop(0))
        else:
            answer.set_result(state)
        return answer


def asked(handle: Any, *, timeout_s: float = 60) -> CascadeState:
    return asyncio.run(ReplicaLink("base", handle).advance(STATE, SamplingSpec(), timeout_s))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.links.PAUSE_S", 0.01)


@pytest.mark.parametrize("answers", [[DEAD], [STRUCK], [DOWN] * 9, [DOWN, DEAD, DOWN]], ids=str)
def test_a_request_outlives_one_death_and_any_number_of_failed_engines(answers: list[Exception]) -> None:
    assert asked(Handle(*answers)) is STATE


@pytest.mark.parametrize("answers", [[DEAD] * 2, [STRUCK] * 2, [DOWN, STRUCK, DOWN, DEAD]], ids=str)
def test_two_deaths_under_one_request_are_its_own_fault(answers: list[Exception]) -> None:
    with pytest.raises(HopLostError, match="two replicas of base died under this request") as lost:
        asked(Handle(*answers))
    assert not lost.value.again


def test_a_hop_that_stays_down_is_given_up_at_the_deadline_for_the_client_to_ask_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.links.PAUSE_S", math.inf)
    with pytest.raises(HopLostError, match="a replica of base is being replaced") as lost:
        asked(Handle(DOWN))
    assert lost.value.again
