"""The application as it is handed to Ray Serve."""

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dd_core import bundle
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.samplers import SamplingSpec
from dd_core.steering import GradientSpec
from serve import app, running
from serve.spec import ServeSpec
from tests.unit.dd_core.test_chain import DDPM
from tests.unit.dd_core.test_chain import trained as trained_chain
from tests.unit.dd_core.test_guides import PARENTS
from tests.unit.serve.tiny import tiny_cascade


def test_what_is_replaced_may_finish_the_longest_request(tmp_path: Path) -> None:
    tiny_cascade(tmp_path)
    ingress = app.build({"cascade": str(tmp_path / "cascade"), "timeout_s": 300})._bound_deployment
    hops = [hop._bound_deployment for hop in ingress.init_args[-1].values()]
    assert [hop.name for hop in hops] == ["base", "prior", "upsampler"]
    for one in (ingress, *hops):
        assert one._deployment_config.graceful_shutdown_timeout_s > 300


def test_the_ingress_knows_the_classes_of_a_classifier_and_hears_no_class_where_it_does_not_lead(
    tmp_path: Path,
) -> None:
    led = SamplingSpec(guidance_scale=1.0, gradient=GradientSpec(classes=2.0))
    hop = HopSpec(stage="base", how=led, guides={"classifier": "judge"})
    stages = {"base": trained_chain(DDPM), "judge": PARENTS["classifier"]}
    for name, one in stages.items():
        bundle.save(tmp_path / name, one.spec, one.weights, parents={}, facts={})
    for how, hears in ((led, True), (led.but(gradient=None), False)):
        spec = CascadeSpec(name="led", hops=(hop.but(how=how),), context_length=12, image_size=16)
        where = tmp_path / f"cascade_{hears}"
        bundle.save_cascade(where, spec, {name: tmp_path / name for name in stages}, card="")
        built = app.build({"cascade": str(where)})._bound_deployment
        specs = built.init_args[4]
        assert specs["judge"].classes == 3
        assert app.hears_classes(spec, specs) == hears


def test_the_door_lets_in_what_the_hop_with_the_least_room_takes_in_all_its_replicas() -> None:
    asked = {"cascade": "c", "hops": {"base": {"max_rows": 2, "max_waiting": 8}}}
    assert ServeSpec.model_validate(asked).room(["base", "upsampler"]) == 10
    asked["hops"] = {"base": {"max_rows": 2, "max_waiting": 8, "max_replicas": 3}}
    spec = ServeSpec.model_validate(asked)
    assert spec.room(["base", "upsampler"]) == 30
    assert spec.room(["upsampler"]) == 8 + 64
    assert spec.but(ingress_replicas=2).room(["base", "upsampler"]) == 15
    assert (spec.replicas(["base"]), spec.replicas(["base", "upsampler"])) == (3, 1)


@pytest.mark.parametrize(
    ("hop", "images"),
    [
        ({}, 2),
        ({"shared": True}, 8),
        ({"num_gpus": 0.5, "max_rows": 32}, 32),
        ({"num_gpus": 1, "shared": False}, 2),
        ({"num_gpus": 1, "busy_requests": 3}, 3),
    ],
)
def test_another_replica_is_started_when_those_there_are_have_more_than_they_draw_at_once_and_little_waits(
    hop: dict[str, Any], images: float, tmp_path: Path
) -> None:
    tiny_cascade(tmp_path)
    asked = {"cascade": str(tmp_path / "cascade"), "hops": {"base": hop | {"max_replicas": 4}}}
    base = app.build(asked)._bound_deployment.init_args[-1]["base"]._bound_deployment
    scaling = base._deployment_config.autoscaling_config
    assert (scaling.target_ongoing_requests, scaling.max_replicas) == (images, 4)


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 30])
def test_as_many_replicas_fit_the_gpus_as_there_may_be(replicas: int, gpus: int) -> None:
    share = running.gpu_share(gpus, replicas)
    assert 0 < share <= 1
    assert share == round(share, 4)  # Ray counts no finer
    assert gpus * math.floor(1 / share) >= replicas  # no replica on two GPUs
    larger = math.floor(1 / share) - 1  # on each
    assert gpus * larger < replicas
    assert running.gpu_share(0, replicas) == running.gpu_share(0.5, replicas) == 0


def test_gpus_are_shared_by_the_hops_that_do_not_say_what_they_want() -> None:
    cascade = CascadeSpec(
        name="tiny", hops=(HopSpec(stage="base"), HopSpec(stage="upsampler")), context_length=8, image_size=8
    )
    asked = ServeSpec.model_validate(
        {"cascade": "c", "hops": {"base": {"num_gpus": 1}, "upsampler": {"max_rows": 2}}}
    )
    for gpus, share in ((3, 1), (2, 0.5), (0, 0)):
        placed = running.on_gpus(asked, cascade, gpus)
        assert placed.hops["base"] == asked.hops["base"]
        assert placed.hops["upsampler"] == asked.hops["upsampler"].but(num_gpus=share)
        assert placed.hop.num_gpus == share
    with pytest.raises(running.ServeError, match="may take 1 of 1 GPUs; name it of the others, too"):
        running.on_gpus(asked, cascade, 1)
    half = asked.but(hops=asked.hops | {"base": asked.hops["base"].but(num_gpus=0.5)})
    assert running.on_gpus(half, cascade, 1).hop.num_gpus == 0.25  # one replica, and one that replaces it
    whole = half.but(hops=half.hops | {"base": half.hops["base"].but(num_gpus=0.99999)})
    with pytest.raises(running.ServeError, match="name it of the others, too"):
        running.on_gpus(whole, cascade, 1)  # what is left is less than Ray can share


@pytest.mark.parametrize(("names", "left"), [(["ddiff"], ["all"]), (["ddiff", "theirs"], ["ddiff"])])
def test_who_leaves_a_serve_that_others_use_takes_away_nothing_of_theirs(
    names: list[str], left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    status = SimpleNamespace(applications=dict.fromkeys(names))
    monkeypatch.setattr("ray.serve.status", lambda: status)
    monkeypatch.setattr("ray.serve.delete", gone.append)
    monkeypatch.setattr("ray.serve.shutdown", lambda: gone.append("all"))
    running.leave()
    assert gone == left


@pytest.mark.parametrize(
    ("now", "gone"),
    [
        ((b"me", 1.0), ["all"]),
        ((b"another", 1.0), []),  # of `ddiff serve`
        ((b"me", 2.0), []),  # of `ddiff deploy`
    ],
)
def test_who_is_told_to_stop_stops_only_what_is_still_its_own(
    now: tuple[bytes, float], gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    found = SimpleNamespace(last_deployed_time_s=now[1])
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={"ddiff": found}))
    monkeypatch.setattr("serve.running._internal_kv_get", lambda key: now[0])
    monkeypatch.setattr("ray.serve.shutdown", lambda: left.append("all"))
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: Ingress([0]))
    monkeypatch.setattr("serve.running.SENDING_S", 0)
    monkeypatch.setattr("signal.signal", lambda number, told: told())
    running.wait(60, (b"me", 1.0))
    assert left == gone


def test_who_fails_to_replace_a_cascade_is_told_that_it_may_be_half_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_cascade(tmp_path)
    found = SimpleNamespace(status="DEPLOY_FAILED", message="OSError: no disk", last_deployed_time_s=1.0)
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={"ddiff": found}))
    monkeypatch.setattr("ray.serve.start", lambda **_: None)
    monkeypatch.setattr("ray.serve.run_many", lambda *_, **__: None)
    monkeypatch.setattr("ray.serve.shutdown", lambda: pytest.fail("it was not ours to stop"))
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr("serve.running._internal_kv_put", lambda *_: None)
    monkeypatch.setattr("serve.running._internal_kv_get", lambda key: b"me")
    monkeypatch.setattr(running, "serving", lambda url: True)
    monkeypatch.setattr(running, "missing", lambda *_: "cascade another answers")
    with pytest.raises(
        running.ServeError, match="no disk; what was on the air may be half replaced: serve it"
    ):
        running.run(ServeSpec(cascade=str(tmp_path / "cascade")))


class Ingress:
    """One whose replicas have these many images in progress when they are asked; none: no answer."""

    def __init__(self, *counts: list[int]) -> None:
        self.counts = list(counts)

    def broadcast(self, method: str) -> "Ingress":
        assert method == "drain"
        return self

    def results(self, *, timeout_s: float) -> list[int]:
        if not self.counts or not (now := self.counts.pop(0)):
            raise TimeoutError
        return now


@pytest.mark.parametrize(
    ("counts", "limit_s", "hurried", "left"),
    [
        ([[2, 0], [1, 0], [0, 0], [9]], 60, False, [[9]]),  # asked until it has finished
        ([[1], [1], [9]], 0, False, [[1], [9]]),
        ([[1], [1], [9]], 60, True, [[1], [9]]),
        ([[1], *[[]] * 5, [0], [9]], 60, False, [[9]]),  # it did not answer for a while
        ([[1], *[[]] * 6, [9]], 60, False, [[9]]),  # it answers no more
        ([[], [9]], 60, True, [[9]]),
    ],
)
def test_images_in_progress_are_waited_for(
    counts: list[list[int]], limit_s: float, hurried: bool, left: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ingress, signal = Ingress(*counts), threading.Event()
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: ingress)
    monkeypatch.setattr("serve.running.SENDING_S", 0)
    if hurried:
        signal.set()
    running.drain(limit_s, hurried=signal)
    assert ingress.counts == left
