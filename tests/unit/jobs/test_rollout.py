"""What Serve is told when a cascade is deployed on a cluster that serves more than this."""

from typing import Any

import ray.serve.schema

from jobs.rollout import Config, beside_others, serve_fields
from serve.app import ServeSpec

CONFIG = Config(serve_fields(ServeSpec(cascade="s3://bucket/cascade", digest="a" * 64)))


def test_the_applications_of_others_are_told_again_for_serve_deletes_what_it_is_not_told() -> None:
    theirs = {"name": "theirs", "route_prefix": "/theirs", "import_path": "theirs:app", "args": {"a": 1}}
    ours = CONFIG.fields["applications"][0]
    before = ours | {"args": ours["args"] | {"digest": "b" * 64}}
    details: dict[str, Any] = {
        "applications": {
            "ddiff": {"deployed_app_config": before},
            "theirs": {"deployed_app_config": theirs},
            "by hand": {"deployed_app_config": None},
        }
    }
    told = beside_others(CONFIG, details)
    assert told["applications"] == [ours, theirs]
    assert told | {"applications": [ours]} == CONFIG.fields
    ray.serve.schema.ServeDeploySchema.model_validate(told)
    assert beside_others(CONFIG, {"applications": {}}) == CONFIG.fields
