"""Addresses are shown without the users and passwords in them, and nothing else is taken out."""

import pytest

from workflows.addresses import has_password, shown


@pytest.mark.parametrize(
    ("text", "seen", "secret"),
    [
        ("http://me:hunter2@head:8265/a", "http://head:8265/a", True),
        ("postgresql+psycopg2://me:a@b@host/db", "postgresql+psycopg2://host/db", True),
        ("x=['https://:token@host/{0..9}.tar']", "x=['https://host/{0..9}.tar']", True),
        ("https://me@host/a", "https://host/a", False),
        ("s3://bucket/runs/a:b@c", "s3://bucket/runs/a:b@c", False),
        ("http://head:8265 and demo@current", "http://head:8265 and demo@current", False),
        ('["http://head:80","me@host"]', '["http://head:80","me@host"]', False),
        ("demo@production", "demo@production", False),
        ("/data/a:b@c", "/data/a:b@c", False),
    ],
)
def test_what_is_shown_of_an_address(text: str, seen: str, secret: bool) -> None:
    assert (shown(text), has_password(text)) == (seen, secret)
