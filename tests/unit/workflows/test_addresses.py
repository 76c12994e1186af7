"""Addresses are shown without the users, passwords and signatures in them, and nothing else is taken out."""

import pytest

from workflows.addresses import has_password, lasting, redacted


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
        ("https://h/a.tar?X-Amz-Date=1&X-Amz-Signature=f0", "https://h/a.tar", True),
        ('["https://h/a?X-Goog-Signature=f0","https://h/b"]', '["https://h/a","https://h/b"]', True),
        ("https://a.blob.core/x/a.tar?sv=2&sig=f%2F0 : 403", "https://a.blob.core/x/a.tar : 403", True),
        ("url='https://h/a?AWSAccessKeyId=A&Expires=1'", "url='https://h/a'", True),
        ("postgresql://db/mlflow?user=me&password=f0", "postgresql://db/mlflow", True),
        ("see (https://h/a?sig=f0), https://h/b?sig=f0: 403", "see (https://h/a), https://h/b: 403", True),
        ("https://h/a?api_key=f0", "https://h/a", True),
        ("https://h/a?token=f0#x", "https://h/a", True),
        ("http://h/a?page=1&design=2", "http://h/a", False),
        ("s3://bucket/0000?.tar", "s3://bucket/0000?.tar", False),
        ("is http://h/a up? sig=1", "is http://h/a up? sig=1", False),
        ("/data/a:b@c", "/data/a:b@c", False),
    ],
)
def test_what_is_shown_of_an_address(text: str, seen: str, secret: bool) -> None:
    assert (redacted(text), has_password(text)) == (seen, secret)


@pytest.mark.parametrize(
    ("url", "lasts"),
    [
        ("https://h/a.tar?X-Amz-Date=1&X-Amz-Expires=9&X-Amz-Signature=f0", "https://h/a.tar"),
        ("https://h/a.tar?versionId=3&X-Amz-Signature=f0", "https://h/a.tar?versionId=3"),
        ("https://h/get?token=file3", "https://h/get?token=file3"),
        ("https://h/a?OSSAccessKeyId=A&Expires=1&Signature=f0&security-token=t", "https://h/a"),
        ("/data/x?sp=1&sig=3.tar", "/data/x?sp=1&sig=3.tar"),
        (
            "https://a.blob.core/a.tar?sv=2&se=3&sp=r&sig=f0&snapshot=1",
            "https://a.blob.core/a.tar?snapshot=1",
        ),
        ("https://h/get?se=1&sp=2", "https://h/get?se=1&sp=2"),
        ("https://h/a?AWSAccessKeyId=A&Expires=1&Signature=f0", "https://h/a"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("/data/what?.tar", "/data/what?.tar"),
    ],
)
def test_a_file_keeps_its_address_when_it_is_signed_anew(url: str, lasts: str) -> None:
    assert lasting(url) == lasts
