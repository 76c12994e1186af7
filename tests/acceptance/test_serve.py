"""A cascade on a real Ray Serve, asked by the unchanged OpenAI client: images, errors, kills, disconnects."""

import asyncio
import base64
import http.client
import io
import json
import select
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import openai
import pytest
import ray
import ray.serve
import torch
from PIL import Image

from dd_core import bundle, images, sealed
from dd_core.cascade import CascadeState, run
from dd_core.text import tokens
from serve import app, running
from serve.spec import ReplicaSpec, ServeSpec
from tests.conftest import small_ray
from tests.ray_head import free_ports
from tests.unit.serve.tiny import tiny_cascade

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
LONG = {"num_inference_steps": 250, "seed": 1}
TENTH = {"num_inference_steps": 25, "seed": 1}
TIMEOUT_S = 600  # of a busy machine: no test here waits for it to pass
TOLD_EVERY_S = 2
"""How often a process here tells its metrics."""
RAY_HERE = {
    "RAY_metrics_report_interval_ms": str(1000 * TOLD_EVERY_S),
    "RAY_worker_niceness": "0",  # what a process has not collected within half an interval is not told
    "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "240s",  # nor what an agent takes later, usually 10 s
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": "3",
    "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "3",
}
"""Settings of Ray's with which nobody waits for long."""


class OnAir(NamedTuple):
    """A served cascade."""

    url: str
    directory: Path
    digest: str

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **options)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_HERE.items():
            patch.setenv(name, value)
        with small_ray():
            yield


@pytest.fixture(scope="module")
def on_air(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnAir]:
    directory = tmp_path_factory.mktemp("served")
    digest = tiny_cascade(directory)
    spec = ServeSpec(
        cascade=str(directory / "cascade"),
        port=free_ports(1)[0],
        timeout_s=TIMEOUT_S,
        hop=ReplicaSpec(threads=1),
    )
    yield OnAir(running.run(spec), directory / "cascade", digest)
    ray.serve.shutdown()


def load(stage: str) -> int:
    """Samples in work or waiting at a hop."""
    handle = ray.serve.get_deployment_handle(stage, app.APPLICATION)
    count: int = handle.load.remote().result(timeout_s=120)
    return count


def until(found: Callable[[], float], wanted: float) -> None:
    """Wait until a value is the one that is wanted, with patience for a busy machine."""
    end = time.monotonic() + 240
    while (value := found()) != wanted:
        assert time.monotonic() < end, f"it is {value:g}, not {wanted:g}"
        time.sleep(0.02)


def offline(directory: Path, prompt: str, seed: int) -> np.ndarray[Any, Any]:
    """The same image painted without Ray, HTTP or engine, [h, w, 3]; with as many threads as a replica."""
    torch.set_num_threads(1)
    cascade = bundle.load_cascade(directory, precision="auto")  # as it is served
    state = CascadeState([seed], torch.tensor(tokens([prompt], cascade.spec.context_length)))
    for hop, link in zip(cascade.hops, cascade.spec.hops, strict=True):
        state = run(hop, state, link.how)
    assert state.image is not None
    return images.to_bytes(state.image)[0].permute(1, 2, 0).numpy()


def pixels(item: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json))))


class Told(NamedTuple):
    """What Prometheus is told."""

    samples: float
    """That the hop base has denoised, counted anew at every step."""
    steps: float
    waits: float
    refused: float
    painted: float
    left: float
    """Clients that went away."""


def told() -> Told:
    """What it is told, as soon as it is told nothing new any more: processes tell it now and then."""
    found = None
    while found != (now := exported()):
        found = now
        time.sleep(2.5 * TOLD_EVERY_S)
    return now


def exported() -> Told:
    """Sums of what Ray's node exports."""
    node = ray.nodes()[0]
    address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=120) as answer:
        lines = answer.read().decode().splitlines()

    def total(name: str, tag: str) -> float:
        found = (line for line in lines if line.startswith(f"ray_ddiff_{name}{{") and tag in line)
        return sum(float(line.rpartition(" ")[2]) for line in found)

    base, ingress = 'deployment="base"', 'deployment="Ingress"'
    return Told(
        samples=total("denoised_samples_total", base),
        steps=total("denoise_step_seconds_count", base),
        waits=total("queue_seconds_count", base),
        refused=total("rejected_total", 'reason="unsupported_value"'),
        painted=total("images_total", ingress),
        left=total("cancelled_total", ingress),
    )


def told_of(act: Callable[[], None], whole: Callable[[Told], bool]) -> Told:
    """What it is told of something, done once more, and again, if that is not the whole.

    Ray's processes tell their node's agent what is new since the last time, and once (2.60): what an agent
    that a busy machine holds up does not hear in time is lost.
    """
    for _ in range(3):
        before = told()
        act()
        found = Told(*(now - then for now, then in zip(told(), before, strict=True)))
        if whole(found):
            break
    return found


def test_prometheus_is_told_of_images_refusals_waits_and_shared_steps(on_air: OnAir) -> None:
    client = on_air.client(max_retries=0)
    steps = TENTH["num_inference_steps"]

    def ask() -> None:
        client.images.generate(prompt="a", n=3, extra_body=TENTH)
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a", size="1x1")

    def whole(told: Told) -> bool:
        return told._replace(steps=0) == Told(3 * steps, 0, waits=3, refused=1, painted=3, left=0)

    found = told_of(ask, whole)
    assert whole(found), found
    assert steps <= found.steps <= 3 * steps


def test_the_official_client_gets_the_images_that_the_cascade_paints_offline(on_air: OnAir) -> None:
    answer = on_air.client().images.generate(
        model="tiny", prompt="a red circle", n=2, size="auto", extra_body={"seed": 5}
    )
    for item, seed in zip(answer.data or [], (5, 6), strict=True):
        assert np.array_equal(pixels(item), offline(on_air.directory, "a red circle", seed))
    assert answer.size == "64x64"


def test_the_official_client_gets_a_url_that_leads_to_the_image(on_air: OnAir) -> None:
    asked = {"prompt": "a red circle", "n": 2, "extra_body": {"seed": 5}}
    files = on_air.client().images.generate(**asked).data or []
    for item, same in zip(
        on_air.client().images.generate(**asked, response_format="url").data or [], files, strict=True
    ):
        with urllib.request.urlopen(str(item.url), timeout=120) as answer:
            assert answer.read() == base64.b64decode(str(same.b64_json))
        assert (on_air.directory.parent / "files" / str(item.url).rpartition("/")[2]).exists()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{on_air.url}/v1/images/files/other.png", timeout=120)


def test_the_official_client_reads_models_headers_and_errors(on_air: OnAir) -> None:
    client = on_air.client(max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ddiff"
    raw = client.images.with_raw_response.generate(prompt="a " * 20, response_format="b64_json", size="64x64")
    assert raw.headers["x-model-version"] == on_air.digest
    assert raw.headers["x-prompt-truncated"] == "prompt"
    assert "," not in raw.headers["x-request-id"]
    with pytest.raises(openai.BadRequestError, match="size: must be auto or a served size: 64x64") as bad:
        client.images.generate(prompt="a", size="1024x1024")
    assert bad.value.param == "size"
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError, match="'dall-e-3'; tiny is served"):
        client.images.generate(prompt="a", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="sise: there is no such parameter"):
        client.images.generate(prompt="a", extra_body={"sise": 1})


def test_the_client_s_patience_is_the_deadline_even_if_it_switches_serve_s_own_off(on_air: OnAir) -> None:
    headers = {"x-stainless-read-timeout": "2", "x-request-timeout-seconds": "0"}
    with (
        on_air.client() as client,
        pytest.raises(openai.InternalServerError, match=r"not finished in 1 s") as late,
    ):
        client.images.generate(prompt="a", n=10, extra_body=LONG, extra_headers=headers)
    assert late.value.status_code == 504
    until(lambda: load("base"), 0)


def test_an_image_is_the_same_whatever_is_served_beside_it(on_air: OnAir) -> None:
    async def ask(seed: int, **more: Any) -> str:
        client = openai.AsyncOpenAI(base_url=f"{on_air.url}/v1", api_key="none")
        async with client:
            answer = await client.images.generate(prompt="a circle", extra_body={"seed": seed} | more)
        assert answer.data
        return str(answer.data[0].b64_json)

    async def crowd() -> list[str]:
        others = [ask(seed, num_inference_steps=3 + seed, guidance_scale=seed) for seed in range(10)]
        return (await asyncio.gather(ask(99), *others, ask(99)))[:: len(others) + 1]

    alone = asyncio.run(ask(99))
    assert asyncio.run(crowd()) == [alone, alone]


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1"}], ids=["plain", "forbidden"])
def test_a_client_that_hangs_up_frees_every_row(on_air: OnAir, headers: dict[str, str]) -> None:
    def hang_up() -> None:
        connection = http.client.HTTPConnection(on_air.url.removeprefix("http://"))
        body = json.dumps({"prompt": "a", "n": 8} | LONG)
        connection.request(
            "POST", "/v1/images/generations", body, {"content-type": "application/json"} | headers
        )
        until(lambda: load("base") == 8 or answered(connection), True)
        connection.close()
        until(lambda: load("base"), 0)

    def answered(connection: http.client.HTTPConnection) -> bool:
        return bool(select.select([connection.sock], [], [], 0)[0])

    def freed(told: Told) -> bool:
        return told.left == 1 and told.samples < 8 * LONG["num_inference_steps"] / 2

    found = told_of(hang_up, freed)
    assert freed(found), found


@pytest.mark.fault
def test_a_killed_replica_costs_a_retry_and_no_request(on_air: OnAir) -> None:
    async def ask() -> int:
        client = openai.AsyncOpenAI(base_url=f"{on_air.url}/v1", api_key="none", max_retries=0)
        async with client:
            request = asyncio.create_task(client.images.generate(prompt="a", n=8, extra_body=LONG))
            await asyncio.to_thread(until, lambda: load("base") == 8 or request.done(), True)
            for actor in before.values():
                ray.kill(actor, no_restart=False)  # as `kill -9` would end it
            assert not request.done()  # it was hit
            return len((await request).data or [])

    before = replicas("base")
    assert before
    assert asyncio.run(ask()) == 8
    until(lambda: len(replicas("base")), len(before))
    assert not before.keys() & replicas("base").keys()


def replicas(stage: str) -> dict[str, ray.actor.ActorHandle]:
    """The replicas of a hop that live, by their actor's id."""
    names = [one for one in ray.util.list_named_actors(all_namespaces=True) if f"#{stage}#" in one["name"]]
    actors = (ray.get_actor(one["name"], namespace=one["namespace"]) for one in names)
    return {actor._actor_id.hex(): actor for actor in actors}


def test_a_stop_lets_what_is_in_work_finish_and_takes_in_no_more(
    on_air: OnAir, caplog: pytest.LogCaptureFixture
) -> None:
    """The last one that asks this ingress: it stays closed."""
    client = on_air.client(max_retries=0)
    with ThreadPoolExecutor(2) as pool:
        working = pool.submit(client.images.generate, prompt="a", n=8, extra_body=LONG)
        until(lambda: load("base") > 0 or working.done(), True)
        assert not working.done()
        draining = pool.submit(running.drain, 600, hurried=threading.Event())
        until(lambda: httpx.get(f"{on_air.url}/health/ready", timeout=120).status_code, 503)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            client.images.generate(prompt="a")
        assert len(working.result().data or []) == 8
        draining.result(timeout=120)
    assert "stopping at once" not in caplog.text


def test_the_same_command_again_finds_its_own_service_and_takes_it_over(on_air: OnAir) -> None:
    small = ReplicaSpec(
        threads=1, num_cpus=0.1
    )  # other settings, and room beside the replicas that are there
    spec = ServeSpec(cascade=str(on_air.directory), port=int(on_air.url.rsplit(":", 1)[1]), hop=small)
    before = running.owner()
    assert running.run(spec) == on_air.url
    assert running.owner()[0] not in (None, before[0])
    assert ray.serve.status().applications[app.APPLICATION].status == "RUNNING"  # with these settings
    large = spec.but(hop=small.but(num_cpus=9), startup_s=30)
    with pytest.raises(
        running.ServeError, match=r"not ready after 30 s: .*taken more than 3s to be scheduled"
    ):
        running.run(large)


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    tiny_cascade(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(running.ServeError, match=f"port {port} of 127.0.0.1: .* choose another port"):
            running.run(ServeSpec(cascade=str(tmp_path / "cascade"), port=port))


def test_a_cascade_that_is_damaged_or_not_the_one_asked_for_is_not_served(tmp_path: Path) -> None:
    digest = tiny_cascade(tmp_path)
    served = str(tmp_path / "cascade")
    with pytest.raises(sealed.SealError, match=f"is cascade {digest[:12]}, not 000000000000 as asked for"):
        app.build({"cascade": served, "digest": "0" * 64})
    with pytest.raises(ValueError, match="hops: 'decoder' is no hop of tiny; it has base, prior, upsampler"):
        app.build({"cascade": served, "hops": {"decoder": {}}})
    weights = tmp_path / "cascade" / "base" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(sealed.SealError, match=r"base/weights\.safetensors: sha256 is"):
        app.build({"cascade": served})
