"""What serving adds to sampling: milliseconds of the engine per tick, and of HTTP and Serve per image.

    python -m tests.benchmarks.serving [--requests 8] [--steps 200] [--images 40] [--json FILE]

The engine is driven with a hop whose model costs next to nothing, against the same samplings driven
one after the other; Serve with a cascade in miniature, one step of its base, against the same hops
called in this process.  Medians of five rounds, after one that is not counted.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dd_core import bundle
from dd_core.cascade import CascadeState, run
from dd_core.samplers import SamplingSpec
from dd_core.text import tokens
from serve.engine import Engine
from tests.ray_head import free_ports
from tests.unit.serve.gaussian import GaussianHop
from tests.unit.serve.tiny import CASCADE, tiny_cascade

ROUNDS = 5


def median(measure: Callable[[], float]) -> float:
    """Median of ROUNDS measurements, after one that is not counted."""
    measure()
    return statistics.median(measure() for _ in range(ROUNDS))


def engine_overhead(requests: int, steps: int) -> dict[str, float]:
    """Milliseconds per request and tick: samplings alone, in the engine with shared calls, with own calls."""
    how = SamplingSpec(sampler="ddim", num_steps=steps, guidance_scale=1.0)
    states = [CascadeState([seed], torch.full((1, 12), 5)) for seed in range(requests)]

    def alone() -> float:
        hop, began = GaussianHop(), time.perf_counter()
        for state in states:
            run(hop, state, how)
        return (time.perf_counter() - began) * 1e3 / requests / steps

    def served(shared: bool) -> float:
        async def main() -> float:
            engine = Engine(GaussianHop(), max_rows=requests, shared=shared)
            ticking, began = asyncio.create_task(engine.run()), time.perf_counter()
            await asyncio.gather(*(engine.submit(state, how, timeout_s=600) for state in states))
            took = time.perf_counter() - began
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            return took * 1e3 / requests / steps

        return asyncio.run(main())

    return {
        "samplings alone": median(alone),
        "engine, shared calls": median(lambda: served(True)),
        "engine, own calls": median(lambda: served(False)),
    }


def serve_overhead(images: int) -> dict[str, float]:
    """Milliseconds per image of few steps: in this process, over HTTP one by one, and eight at a time."""
    import ray.serve  # noqa: PLC0415 - the engine's figures need none

    from serve import running  # noqa: PLC0415
    from serve.spec import ReplicaSpec, ServeSpec  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as directory:
        tiny_cascade(Path(directory))
        served = Path(directory) / "cascade"
        cascade = bundle.load_cascade(served, precision="auto")  # as it is served
        url = running.run(ServeSpec(cascade=str(served), port=free_ports(1)[0], hop=ReplicaSpec(threads=1)))

        def here(seed: int) -> None:
            caption = torch.tensor(tokens(["a circle"], CASCADE.context_length))
            state = CascadeState([seed], caption)
            for hop, link in zip(cascade.hops, cascade.spec.hops, strict=True):
                state = run(hop, state, link.how.but(num_steps=1) if link.follows_request else link.how)

        def over_http(seed: int) -> None:
            body = json.dumps({"prompt": "a circle", "seed": seed, "num_inference_steps": 1}).encode()
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/images/generations", body, headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()

        def timed(paint: Callable[[int], None], threads: int) -> float:
            with ThreadPoolExecutor(threads) as pool:
                began = time.perf_counter()
                list(pool.map(paint, range(images)))
                return (time.perf_counter() - began) * 1e3 / images

        figures = {
            "in this process": median(lambda: timed(here, 1)),
            "HTTP, one at a time": median(lambda: timed(over_http, 1)),
            "HTTP, eight at a time": median(lambda: timed(over_http, 8)),
        }
        ray.serve.shutdown()
        ray.shutdown()
        return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    load = os.getloadavg()[0]
    figures = {
        "load of the machine at the start": load,
        "ms per request and tick": engine_overhead(options.requests, options.steps),
        "ms per image": serve_overhead(options.images),
    }
    text = json.dumps(figures, indent=2)
    if options.json:
        options.json.write_text(text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
