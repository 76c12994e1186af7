"""A model that paints by class, on a real Ray Serve: the class is asked for over HTTP, or asked after.

Its replicas are as many as the load needs.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import ray.serve

from dd_core import bundle
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.samplers import SamplingSpec
from serve import app, running
from serve.spec import ReplicaSpec, ServeSpec
from tests.ray_head import free_ports
from tests.unit.dd_core.test_chain import EDM, trained

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
HEUN = SamplingSpec(sampler="heun", num_steps=2, guidance_scale=1.0)


@pytest.fixture(scope="module")
def client(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory: Path = tmp_path_factory.mktemp("classes")
    bundle.save(directory / "base", EDM, trained(EDM).weights, parents={}, facts={})
    hops = (HopSpec(stage="base", how=HEUN, follows_request=True),)
    cascade = CascadeSpec(name="classes", hops=hops, context_length=12, image_size=16)
    bundle.save_cascade(directory / "cascade", cascade, {"base": directory / "base"}, card="classes")
    hop = ReplicaSpec(num_cpus=0.2, threads=1, max_replicas=2, upscale_delay_s=0, downscale_delay_s=0)
    spec = ServeSpec(cascade=str(directory / "cascade"), port=free_ports(1)[0], hop=hop)
    yield openai.OpenAI(base_url=f"{running.run(spec)}/v1", api_key="none", max_retries=0)
    ray.serve.shutdown()


def painted(client: openai.OpenAI, **more: int) -> str:
    (item,) = client.images.generate(prompt="x", extra_body={"seed": 1} | more).data or []
    assert item.b64_json
    return item.b64_json


def test_every_class_has_its_picture(client: openai.OpenAI) -> None:
    assert len({painted(client, label=label) for label in range(3)}) == 3
    assert painted(client, label=1) == painted(client, label=1)


def test_a_request_that_the_model_cannot_serve_is_told_what_to_ask_instead(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as nameless:
        painted(client)
    assert nameless.value.body == {
        "message": "hop base: it paints by class, and the request names none; give a label",
        "type": "invalid_request_error",
        "param": "label",
        "code": "unsupported_value",
    }
    with pytest.raises(openai.BadRequestError, match=r"label \[3\]: classes are 0 to 2"):
        painted(client, label=3)
    painted(client, label=2)  # and it serves on


def replicas() -> int:
    """Of the hop, that answer."""
    base = ray.serve.status().applications[app.APPLICATION].deployments["base"]
    return base.replica_states.get("RUNNING", 0)


def drawing() -> int:
    """Those with samples in work or waiting."""
    handle = ray.serve.get_deployment_handle("base", app.APPLICATION)
    loads = handle.broadcast("load").results(timeout_s=120, return_exceptions=True)  # one may be going
    return sum(load > 0 for load in loads if isinstance(load, int))


def until(fact: Callable[[], bool]) -> None:
    """Wait for it, with patience for a busy machine."""
    end = time.monotonic() + 240
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_more_requests_than_a_replica_draws_start_another_which_goes_when_they_have_ended(
    client: openai.OpenAI,
) -> None:
    enough = threading.Event()

    def asks(seed: int) -> list[str]:
        found = []
        while not enough.is_set():
            found.append(painted(client, label=1, seed=seed, num_inference_steps=50))
        return found

    until(lambda: replicas() == 1)
    with ThreadPoolExecutor(4) as people:
        asked = [people.submit(asks, seed) for seed in range(4)]
        until(lambda: replicas() == 2 or any(one.done() for one in asked))
        until(lambda: drawing() == 2 or any(one.done() for one in asked))
        enough.set()
        found = [one.result() for one in asked]
    assert all(len(set(pictures)) == 1 for pictures in found)  # whoever drew it
    assert len({pictures[0] for pictures in found}) == 4
    until(lambda: replicas() == 1)
