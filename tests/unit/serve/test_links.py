"""Links: what dies is asked again elsewhere, what is being replaced a little later, and neither for ever."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from dd_core.cascade import CascadeSpec, CascadeState, HopSpec, requested
from dd_core.samplers import SamplingSpec
from serve.engine import DeviceLostError, EngineDownError, OtherCascadeError, RefusedError
from serve.links import ReplicaLink
from serve.painter import HopLostError, Order, Painter, Served
from serve.replicas import HopReplica
from serve.spec import ReplicaSpec
from tests.unit.serve.tiny import tiny_cascade

STATE = CascadeState(seeds=[1], tokens=torch.zeros(1, 12))
DEAD, DOWN, STRUCK = RayActorError(), EngineDownError("failed"), DeviceLostError("failed")
OTHER = OtherCascadeError("another")
LOST = [kind("ab" * 28, None, "") for kind in (ObjectLostError, OwnerDiedError)]
OLD, NEW = "a" * 64, "b" * 64


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
    return asyncio.run(ReplicaLink("base", handle, OLD, "auto").advance(STATE, SamplingSpec(), timeout_s))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAUSE_S", "STRANGE_PAUSE_S", "READY_PAUSE_S"):
        monkeypatch.setattr(f"serve.links.{name}", 0.01)


@pytest.mark.parametrize("answers", [[DEAD], [STRUCK], [DOWN] * 9, [DOWN, DEAD, OTHER], LOST * 3], ids=str)
def test_a_request_outlives_one_death_and_any_number_of_failed_engines_and_lost_pictures(
    answers: list[Exception],
) -> None:
    assert asked(Handle(*answers)) is STATE


@pytest.mark.parametrize("answers", [[DEAD] * 2, [STRUCK] * 2, [DOWN, STRUCK, DOWN, DEAD]], ids=str)
def test_two_deaths_under_one_request_are_its_own_fault(answers: list[Exception]) -> None:
    with pytest.raises(HopLostError, match="two replicas of base died under this request") as lost:
        asked(Handle(*answers))
    assert not lost.value.again


class Mortal:
    """The only replica of a deployment: one of its requests kills it, and with it all that it works on."""

    def __init__(self, deadly: CascadeState) -> None:
        self.deadly, self.advance, self.deaths = deadly, self, 0
        self.working: list[asyncio.Future[CascadeState]] = []

    def remote(self, state: CascadeState, *_: Any) -> "asyncio.Future[CascadeState]":
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[CascadeState] = loop.create_future()
        self.working.append(answer)
        if state is self.deadly:
            loop.call_later(0.01, self.die, answer)
        else:
            loop.call_later(0.05, lambda: answer.done() or answer.set_result(state))
        return answer

    def die(self, under: "asyncio.Future[CascadeState]") -> None:
        if under.done():  # it died with that request already, under another one
            return
        self.deaths += 1
        for answer in self.working:
            if not answer.done():
                answer.set_exception(RayActorError())


def test_a_request_that_kills_replicas_takes_none_of_its_neighbours_with_it() -> None:
    deadly, *others = (CascadeState(seeds=[seed], tokens=torch.full((1, 12), seed)) for seed in range(7))
    mortal: Any = Mortal(deadly)

    async def main() -> list[Any]:
        link = ReplicaLink("base", mortal, OLD, "auto")
        asked = [link.advance(one, SamplingSpec(), 60) for one in (*others[:3], deadly, *others[3:])]
        told = await asyncio.gather(*asked, return_exceptions=True)
        again = [deadly, deadly._replace(seeds=[99]), *others[:1]]  # nor is it tried again, whatever its seed
        return told + await asyncio.gather(
            *(link.advance(one, SamplingSpec(), 60) for one in again), return_exceptions=True
        )

    told = asyncio.run(main())
    lost = [told.pop(3), *told[6:8]]
    assert all(isinstance(one, HopLostError) and not one.again for one in lost)
    assert all(one is other for one, other in zip([*told[:6], told[8]], [*others, others[0]], strict=True))
    assert mortal.deaths == 2


def test_the_same_deadly_request_ten_times_at_once_kills_two_replicas_and_not_its_like() -> None:
    deadly = CascadeState(seeds=[1], tokens=torch.zeros(1, 12))
    like = deadly._replace(negative=torch.ones(1, 12))
    mortal: Any = Mortal(deadly)

    async def main() -> list[Any]:
        link = ReplicaLink("base", mortal, OLD, "auto")
        asked = (link.advance(one, SamplingSpec(), 60) for one in (*[deadly] * 10, like))
        return await asyncio.gather(*asked, return_exceptions=True)

    *lost, other = asyncio.run(main())
    assert all(isinstance(one, HopLostError) and not one.again for one in lost)
    assert other is like
    assert mortal.deaths == 2


def test_a_replica_whose_node_is_taken_away_counts_as_no_death() -> None:
    leaving = RayActorError(preempted=True)
    assert asked(Handle(*[leaving] * 5)) is STATE


def test_a_hop_that_failed_to_deploy_is_there_for_nobody_now() -> None:
    unavailable = DeploymentUnavailableError(DeploymentID(name="base", app_name="ddiff"))
    with pytest.raises(HopLostError, match="no replica of base can be started") as lost:
        asked(Handle(unavailable))
    assert lost.value.again


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_a_hop_refuses_is_told_in_its_own_words(wrapped: bool) -> None:
    refused: Exception = RefusedError("steps 7: it takes 1, 2 or 4")
    if wrapped:
        refused = RayTaskError("advance", "Traceback: many lines", refused).as_instanceof_cause()
        assert "Traceback" in str(refused)
    with pytest.raises(RefusedError) as told:
        asked(Handle(refused))
    assert type(told.value) is RefusedError
    assert str(told.value) == "steps 7: it takes 1, 2 or 4"


def test_a_hop_that_stays_down_is_given_up_at_the_deadline_for_the_client_to_ask_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.links.PAUSE_S", math.inf)
    with pytest.raises(HopLostError, match="a replica of base is being replaced") as lost:
        asked(Handle(DOWN))
    assert lost.value.again


def test_a_request_whose_cascade_has_been_replaced_is_given_back_to_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.links.STRANGE_S", 0.05)
    with pytest.raises(HopLostError, match="a replica of base is being replaced") as lost:
        asked(Handle(*[OTHER] * 1000))
    assert lost.value.again


def test_while_some_replicas_serve_its_cascade_a_request_asks_until_it_meets_one() -> None:
    assert asked(Handle(*[OTHER] * 20)) is STATE


class Telling:
    """A deployment whose replicas say these things of what they serve."""

    def __init__(self, *answers: Exception | Served) -> None:
        self.answers, self.ready = list(answers), self

    def remote(self) -> "asyncio.Future[Served]":
        found, answer = asyncio.get_running_loop().create_future(), self.answers.pop(0)
        if isinstance(answer, Served):
            found.set_result(answer)
        else:
            found.set_exception(answer)
        return found


def test_a_failed_replica_does_not_speak_for_the_others() -> None:
    whole = Served(OLD, "auto", "bf16")
    handle: Any = Telling(DOWN, DEAD, whole)
    assert asyncio.run(ReplicaLink("base", handle, OLD, "auto").ready()) is whole
    alone: Any = Telling(*[DOWN] * 99)
    with pytest.raises(EngineDownError):
        asyncio.run(ReplicaLink("base", alone, OLD, "auto").ready())


class Replica(Handle):
    """The only replica of a deployment, of this cascade."""

    def __init__(self, digest: str) -> None:
        super().__init__()
        self.digest, self.drawn = digest, 0

    def remote(self, state: CascadeState, *asked: Any) -> "asyncio.Future[CascadeState]":
        self.answers = [] if asked[-2:] == (self.digest, "auto") else [OTHER]
        self.drawn += not self.answers
        return super().remote(state, *asked)


def test_no_image_is_drawn_half_by_one_cascade_and_half_by_another() -> None:
    hops = {"prior": Replica(OLD), "base": Replica(NEW)}  # in the middle of a rollout
    links = {stage: ReplicaLink(stage, hop, OLD, "auto") for stage, hop in hops.items()}  # type: ignore[arg-type]
    cascade = CascadeSpec(
        name="two", hops=(HopSpec(stage="prior"), HopSpec(stage="base")), context_length=12, image_size=4
    )
    order = Order(prompt="a", negative="", seeds=[1], steps=None, effort=1, scale=None)
    with pytest.raises(HopLostError, match="base is being replaced") as lost:
        asyncio.run(Painter(cascade, OLD, links, precision="auto").paint(order, 60))
    assert lost.value.again
    assert [hop.drawn for hop in hops.values()] == [1, 0]


def test_a_replica_draws_for_its_own_cascade_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get_gpu_ids", list)
    digest = tiny_cascade(tmp_path)
    where, spec = str(tmp_path / "cascade"), ReplicaSpec(shared=False)
    replica = HopReplica.func_or_class(where, "prior", spec, digest=digest, precision="fp32")
    state = requested(["a"], [1], 12)
    how = SamplingSpec(num_steps=2)
    with pytest.raises(OtherCascadeError, match=f"prior serves cascade {digest[:12]}, not {NEW[:12]}"):
        asyncio.run(replica.advance(state, how, 9, NEW, "fp32"))
    with pytest.raises(OtherCascadeError, match="prior was told precision fp32, not bf16"):
        asyncio.run(replica.advance(state, how, 9, digest, "bf16"))
    assert asyncio.run(replica.ready()).computes == ""  # a prior is told no precision

    async def both() -> list[CascadeState]:
        named = replica.advance(state, how, 9, digest, "fp32")
        return [await named, await replica.advance(state, how, 9, digest)]  # former code names none

    assert all(made.image_embedding is not None for made in asyncio.run(both()))
