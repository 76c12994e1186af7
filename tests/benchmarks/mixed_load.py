"""Latency of requests under mixed load: batched at every denoising step, or by Ray Serve's own batching.

    python -m tests.benchmarks.mixed_load CASCADE [--load .7] [--seconds 120] [--json FILE]

One replica of the cascade's base has one thread.  Requests of 4 to 50 steps arrive at random (Poisson), at
`load` times the rate that Ray Serve's own batching reaches when saturated, and at the same moments for each:

    requests    `@ray.serve.batch`: up to eight at a time, one sampling for each number of steps among them
    steps       the engine: waiting requests join at the next step, one call of the network for all
    own calls   the engine as it works on a CPU by default: a call for each request

With --goodput, `steps` is then given more and more requests, until its 99th percentile exceeds that of
`requests`: the most that it finishes in the same time is its goodput.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dd_core import bundle
from dd_core.cascade import CascadeState, requested, run
from dd_core.precision import Precision
from dd_core.samplers import SamplingSpec

PRECISION: Precision = "fp32"
"""Of all of them; README's figures were measured in it."""
STAGE = "base"
STEPS = (4, 8, 15, 25, 50)
MORE = (1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0)
"""Factors of the load at which --goodput measures, in this order."""
AT_ONCE = 8
PROMPTS = ("a red circle above a small blue square", "a yellow triangle", "a pink star in the middle")
PATIENCE_S = 600.0
Ask = Callable[[CascadeState, SamplingSpec], Awaitable[Any]]


def states_of(cascade: Path) -> list[CascadeState]:
    """Inputs of the base: captions, and embeddings that the prior has drawn for them."""
    spec = bundle.load_cascade(cascade).spec
    link = next(link for link in spec.hops if link.stage == "prior")
    prior = bundle.open_hop(cascade, "prior", "cpu")
    asked = [requested([prompt], [seed], spec.context_length) for seed, prompt in enumerate(PROMPTS)]
    return [run(prior, state, link.how) for state in asked]


def together(states: Sequence[CascadeState]) -> CascadeState:
    """One state for several requests."""
    embeddings = [state.image_embedding for state in states if state.image_embedding is not None]
    return CascadeState(
        [seed for state in states for seed in state.seeds],
        torch.cat([state.tokens for state in states]),
        image_embedding=torch.cat(embeddings),
    )


def by_requests(cascade: Path) -> Ask:
    """The hop behind Ray Serve's batching."""
    import ray.serve  # noqa: PLC0415 after the environment is set

    @ray.serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
    class Batched:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.hop = bundle.open_hop(cascade, STAGE, "cpu", PRECISION)

        @ray.serve.batch(max_batch_size=AT_ONCE, batch_wait_timeout_s=0.01)
        async def advance(self, asked: list[tuple[CascadeState, SamplingSpec]]) -> list[int]:
            return await asyncio.to_thread(self.painted, asked)

        def painted(self, asked: list[tuple[CascadeState, SamplingSpec]]) -> list[int]:
            for steps in {how.num_steps for _, how in asked}:
                alike = [(state, how) for state, how in asked if how.num_steps == steps]
                run(self.hop, together([state for state, _ in alike]), alike[0][1])
            return [how.num_steps for _, how in asked]

    handle = ray.serve.run(Batched.bind(), name="requests", route_prefix=None)
    return lambda state, how: handle.advance.remote((state, how))


def by_steps(cascade: Path, name: str, *, shared: bool) -> Ask:
    """The hop in the engine, as it is served."""
    import ray.serve  # noqa: PLC0415

    from dd_core import sealed  # noqa: PLC0415
    from serve.replicas import HopReplica  # noqa: PLC0415
    from serve.spec import ReplicaSpec  # noqa: PLC0415

    digest = sealed.verify(cascade).digest
    spec = ReplicaSpec(max_rows=AT_ONCE, shared=shared, threads=1)
    options = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 1}}
    app = HopReplica.options(**options).bind(str(cascade), STAGE, spec, digest=digest, precision=PRECISION)
    handle = ray.serve.run(app, name=name, route_prefix=None)
    return lambda state, how: handle.advance.remote(state, how, PATIENCE_S, digest, PRECISION)


async def saturated(ask: Ask, states: Sequence[CascadeState], how: SamplingSpec, seconds: float) -> float:
    """Requests finished per second, by two batches of clients that ask again as soon as they are answered."""
    rng, finished = np.random.default_rng(0), 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal finished
        while time.perf_counter() < end:
            await ask(states[finished % len(states)], how.but(num_steps=int(rng.choice(STEPS))))
            finished += 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(2 * AT_ONCE)))
    return finished / (time.perf_counter() - began)


async def waits(
    ask: Ask, states: Sequence[CascadeState], how: SamplingSpec, arrivals: Sequence[tuple[float, int]]
) -> list[tuple[int, float]]:
    """Steps of each request, and the seconds that it took, waiting included."""
    began = time.perf_counter()

    async def one(number: int, at: float, steps: int) -> tuple[int, float]:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        await ask(states[number % len(states)], how.but(num_steps=steps))
        return steps, time.perf_counter() - began - at

    return list(await asyncio.gather(*(one(i, at, steps) for i, (at, steps) in enumerate(arrivals))))


def arriving(rate: float, seconds: float) -> list[tuple[float, int]]:
    """Moments at which requests come, `rate` a second, and the steps of each; the same at every call."""
    rng = np.random.default_rng(1)
    moments = np.cumsum(rng.exponential(1 / rate, 10_000))
    return [(float(at), int(rng.choice(STEPS))) for at in moments if at < seconds]


def goodput(
    ask: Ask, states: Sequence[CascadeState], how: SamplingSpec, load: tuple[float, float], limit: float
) -> dict[str, float]:
    """99th percentile at each factor of `load` (requests a second, seconds), up to one above `limit`."""
    found: dict[str, float] = {}
    for more in MORE:
        took = asyncio.run(waits(ask, states, how, arriving(more * load[0], load[1])))
        found[f"{more:g}"] = tail = summary(took)["p99"]
        sys.stdout.write(f"{more:g} times the load: p99 {tail:.2f} s\n")
        sys.stdout.flush()
        if tail > limit:
            break
    return found


def summary(took: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Median, 90th and 99th percentile of all, and medians by number of steps."""
    seconds = [one for _, one in took]
    found = {f"p{share}": float(np.percentile(seconds, share)) for share in (50, 90, 99)}
    by = {steps: [one for number, one in took if number == steps] for steps in STEPS}
    return found | {f"{steps} steps": float(np.median(some)) for steps, some in by.items() if some}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", type=Path)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--goodput", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cascade = options.cascade.absolute()
    torch.set_num_threads(1)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray.serve  # noqa: PLC0415

    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.serve.start(logging_config={"enable_access_log": False})
    states = states_of(cascade)
    hops = bundle.load_cascade(cascade).spec.hops
    how = next(link.how for link in hops if link.stage == STAGE)
    figures: dict[str, Any] = {}
    try:
        asks = {
            "requests": by_requests(cascade),
            "steps": by_steps(cascade, "steps", shared=True),
            "own calls": by_steps(cascade, "own-calls", shared=False),
        }
        capacity = asyncio.run(saturated(asks["requests"], states, how, options.seconds / 4))
        load = options.load * capacity, options.seconds
        arrivals = arriving(*load)
        figures = {"requests a second, saturated": capacity, "arrivals": len(arrivals)}
        for name, ask in asks.items():
            figures[name] = summary(asyncio.run(waits(ask, states, how, arrivals)))
            sys.stdout.write(f"{name}: {figures[name]}\n")
            sys.stdout.flush()
        if options.goodput:
            limit = figures["requests"]["p99"]
            figures["goodput"] = goodput(asks["steps"], states, how, load, limit)
    finally:
        ray.shutdown()
    text = json.dumps(figures, indent=2)
    if options.json:
        options.json.write_text(text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
