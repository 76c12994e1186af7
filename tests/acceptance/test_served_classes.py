"""A model that paints by class, on a real Ray Serve: the class is asked for over HTTP, or asked after."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import ray.serve

from dd_core import bundle
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.samplers import SamplingSpec
from serve import app
from serve.spec import ReplicaSpec, ServeSpec
from tests.ray_head import free_ports
from tests.unit.dd_core.test_chain import EDM, trained

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
HEUN = SamplingSpec(sampler="heun", num_steps=2, guidance_scale=1.0)


@pytest.fixture(scope="module")
def client(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory: Path = tmp_path_factory.mktemp("classes")
    bundle.save(directory / "base", EDM, trained(EDM).weights, parents={}, facts={})
    cascade = CascadeSpec(
        name="classes", hops=(HopSpec(stage="base", how=HEUN),), context_length=12, image_size=16
    )
    bundle.save_cascade(directory / "cascade", cascade, {"base": directory / "base"}, card="classes")
    spec = ServeSpec(cascade=str(directory / "cascade"), port=free_ports(1)[0], hop=ReplicaSpec(threads=1))
    yield openai.OpenAI(base_url=f"{app.run(spec)}/v1", api_key="none", max_retries=0)
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
        "param": None,
        "code": "unsupported_value",
    }
    with pytest.raises(openai.BadRequestError, match=r"label \[3\]: classes are 0 to 2"):
        painted(client, label=3)
    painted(client, label=2)  # and it serves on
