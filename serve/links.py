"""Links: the hops as the ingress reaches them, through the handles of Ray Serve."""

import asyncio
import hashlib
import math

from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dd_core.cascade import CascadeState
from dd_core.precision import Precision
from dd_core.samplers import SamplingSpec
from serve.engine import DeviceLostError, EngineDownError, OtherCascadeError, RefusedError
from serve.painter import HopLostError, Served

PAUSE_S = 1.0
"""Pause before a hop is asked again whose replica cannot serve: Serve has to replace that first."""
STRANGE_S, STRANGE_PAUSE_S = 5.0, 0.1
"""Time after which a request that has met only replicas of another cascade gives up (its own is not coming,
but gone), and the pause between two of them: those refuse at once, so Serve prefers them to busy ones."""
DEATHS = (RayActorError, DeviceLostError)
"""What a request is told under which a replica or its device died."""
QUARANTINE_S, QUARANTINED = 600.0, 100
"""How long a deadly request is refused, and how many of them are remembered."""
READY_TRIES, READY_PAUSE_S = 5, 0.2
"""How often a hop is asked whether it is ready while failed replicas answer, and the pause in between."""


def identity(state: CascadeState, how: SamplingSpec) -> str:
    """Digest of what a request asks for, its seeds aside."""
    told = [None if one is None else one.tolist() for one in (state.tokens, state.negative, state.label)]
    return hashlib.sha256(repr((how, told)).encode()).hexdigest()


class ReplicaLink:
    """Any replica of the deployment of a hop.

    A sampling is seeded, so it can be repeated: when a replica dies, all its requests are sent once more, one
    after the other: it was the fault of one of them at most, and a second death most likely tells of which
    (fresh requests may run beside it).  That one is refused for a while if it is sent again, whatever its
    seed.  A replica that had failed before it was asked does not count, nor does one on a node that is taken
    away, nor a picture that was lost with its node on the way: these are repeated until the deadline.

    While a cascade is replaced by another one each hop changes at its own time, so each request names its
    cascade and its precision: no image is drawn half by the one and half by the other.
    """

    def __init__(self, stage: str, handle: DeploymentHandle, digest: str, precision: Precision) -> None:
        self.stage, self.handle, self.whose = stage, handle, (digest, precision)
        self.suspects = asyncio.Lock()
        self.deadly: dict[str, float] = {}
        """Requests under which two replicas died, and when, on the loop's clock."""

    async def advance(self, state: CascadeState, how: SamplingSpec, timeout_s: float) -> CascadeState:
        clock = asyncio.get_running_loop().time
        until, asked = clock() + timeout_s, identity(state, how)
        self.refuse_deadly(asked, clock())
        try:
            return await self.repeated(state, how, until)
        except DEATHS:
            async with self.suspects:
                self.refuse_deadly(asked, clock())  # the same has been tried before it in the line
                try:
                    return await self.repeated(state, how, until)
                except DEATHS as error:
                    self.deadly[asked] = clock()
                    self.deadly = dict(sorted(self.deadly.items(), key=lambda one: one[1])[-QUARANTINED:])
                    raise self.deadly_error() from error

    def refuse_deadly(self, asked: str, now: float) -> None:
        """Raises HopLostError for a request under which two replicas have died of late."""
        if self.deadly.get(asked, -math.inf) > now - QUARANTINE_S:
            raise self.deadly_error()

    def deadly_error(self) -> HopLostError:
        """What is said of such a request."""
        return HopLostError(f"two replicas of {self.stage} died under this request", again=False)

    async def repeated(self, state: CascadeState, how: SamplingSpec, until: float) -> CascadeState:
        """The answer of a replica that did not fail before it was asked.

        Raises:
            RayActorError, DeviceLostError: It died under this request.
            HopLostError: There is none until the deadline, which is on the loop's clock.
        """
        clock, met = asyncio.get_running_loop().time, math.inf
        while True:
            try:
                return await self.asked(state, how, until - clock())
            except DeviceLostError:
                await asyncio.sleep(PAUSE_S)
                raise
            except RayActorError as error:
                if not error.preempted:
                    raise
                lost: Exception = error
            except (ObjectLostError, EngineDownError, OtherCascadeError) as error:
                lost = error
            strange = isinstance(lost, OtherCascadeError)
            met = min(met, clock()) if strange else math.inf
            pause = STRANGE_PAUSE_S if strange else PAUSE_S
            if clock() - met >= STRANGE_S or clock() + pause > until:
                raise HopLostError(f"a replica of {self.stage} is being replaced", again=True) from lost
            await asyncio.sleep(pause)

    async def asked(self, state: CascadeState, how: SamplingSpec, timeout_s: float) -> CascadeState:
        """The answer of one replica."""
        response = self.handle.advance.remote(state, how, timeout_s, *self.whose)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RefusedError as error:  # Ray's copy reads as a traceback, its cause as it was raised
            raise RefusedError(str(getattr(error, "cause", error))) from None
        except DeploymentUnavailableError as error:
            raise HopLostError(f"no replica of {self.stage} can be started", again=True) from error

    async def ready(self) -> Served:
        for _ in range(READY_TRIES - 1):
            try:
                return await self.told()
            except (RayActorError, EngineDownError):  # Serve has not removed it yet; another may serve
                await asyncio.sleep(READY_PAUSE_S)
        return await self.told()

    async def told(self) -> Served:
        """What one replica serves."""
        response = self.handle.ready.remote()
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def all_ready(self, timeout_s: float) -> list[object]:
        asked = self.handle.broadcast("ready")
        return list(await asked.results_async(timeout_s=timeout_s, return_exceptions=True))
