"""The application as it is handed to Ray Serve."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from serve import app
from tests.unit.serve.tiny import tiny_cascade


def test_what_is_replaced_may_finish_the_longest_request(tmp_path: Path) -> None:
    tiny_cascade(tmp_path)
    ingress = app.build({"cascade": str(tmp_path / "cascade"), "timeout_s": 300})._bound_deployment
    hops = [hop._bound_deployment for hop in ingress.init_args[-1].values()]
    assert [hop.name for hop in hops] == ["base", "prior", "upsampler"]
    for one in (ingress, *hops):
        assert one._deployment_config.graceful_shutdown_timeout_s > 300


@pytest.mark.parametrize(("names", "left"), [(["ddiff"], ["all"]), (["ddiff", "theirs"], ["ddiff"])])
def test_who_leaves_a_serve_that_others_use_takes_away_nothing_of_theirs(
    names: list[str], left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    status = SimpleNamespace(applications=dict.fromkeys(names))
    monkeypatch.setattr("ray.serve.status", lambda: status)
    monkeypatch.setattr("ray.serve.delete", gone.append)
    monkeypatch.setattr("ray.serve.shutdown", lambda: gone.append("all"))
    app.leave()
    assert gone == left
