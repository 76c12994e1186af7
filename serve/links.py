"""Links: the hops as the ingress reaches them, through the handles of Ray Serve."""

import asyncio

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dd_core.cascade import CascadeState
from dd_core.samplers import SamplingSpec
from serve.engine import BusyError, EngineDownError, RefusedError
from serve.painter import HopLostError


class ReplicaLink:
    """Any replica of the deployment of a hop.

    A sampling is seeded, so it may be asked again: when a replica dies, its request goes once more to
    another one.  Two deaths under one request are more likely than not its own fault.
    """

    def __init__(self, stage: str, handle: DeploymentHandle) -> None:
        self.stage, self.handle = stage, handle

    async def advance(self, state: CascadeState, how: SamplingSpec, timeout_s: float) -> CascadeState:
        clock = asyncio.get_running_loop().time
        until = clock() + timeout_s
        for _ in range(2):
            response = self.handle.advance.remote(state, how, until - clock())
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                raise BusyError(f"too many requests wait for {self.stage}") from None
            except RefusedError as error:  # Ray's copy reads as a traceback, its cause as it was raised
                raise RefusedError(str(getattr(error, "cause", error))) from None
            except DeploymentUnavailableError as error:
                raise HopLostError(f"no replica of {self.stage} can be started", again=True) from error
            except (RayActorError, EngineDownError) as error:
                lost: Exception = error
        raise HopLostError(f"two replicas of {self.stage} died under this request", again=False) from lost

    async def ready(self) -> str:
        response = self.handle.ready.remote()
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
