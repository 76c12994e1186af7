"""A SafeName never leaves its directory, whatever path or address it is joined to, and is one plain word."""

import os
import random
import string
from pathlib import Path, PureWindowsPath
from urllib.parse import quote, unquote, urljoin, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dd_core.spec import SafeName

NAME: TypeAdapter[str] = TypeAdapter(SafeName)
LETTERS = string.ascii_letters + string.digits
MOST = 128
"""Characters of the longest name."""
PARTS = (
    *(
        "..",
        ".",
        "/",
        "\\",
        "//",
        "\\\\?\\",
        "~",
        "%2e",
        "%2f",
        "%5c",
        "%00",
        ":",
        "C:",
        "file://",
        "s3://b/",
    ),
    *("\0", "\n", "\r", "\r\n", "\t", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\u200b"),
    *(
        "\uff0e\uff0e",
        "\u2215",
        "\u2044",
        "\uff0f",
        "\uff3c",
        "\u212a",
        "\u0131",
        "e\u0301",
        "\u0660",
        "\U0001d7d8",
    ),
    *(
        "CON",
        "NUL",
        "aux.txt",
        "LPT1",
        "a::$DATA",
        "PROGRA~1",
        " ",
        "-",
        "_",
        "$HOME",
        "`id`",
        "*",
        "?",
        "#",
        "@",
    ),
    *("a", "base", "x" * (MOST - 1), "x" * MOST, "x" * 5000),
)
"""Of which hostile names are made: ways up, control characters, look-alikes, Windows' own names, lengths."""


def taken(name: str) -> bool:
    """Whether the type takes a name."""
    try:
        return NAME.validate_python(name) == name
    except ValidationError:
        return False


def stays(name: str, directory: Path) -> bool:
    """Whether what a name is joined to keeps it directly within, as one entry of that very name."""
    here, there, url = (
        directory / name,
        PureWindowsPath("C:\\runs") / name,
        urljoin("http://host/runs/", name),
    )
    return (
        (here.parent, here.name) == (directory, name)
        and Path(os.path.normpath(here)) == here.resolve() == here
        and (there.parent, there.name, there.drive) == (PureWindowsPath("C:\\runs"), name, "C:")
        and url == f"http://host/runs/{name}"
        and urlsplit(f"s3://bucket/runs/{name}").path == f"/runs/{name}"
        and quote(name, safe="") == unquote(name) == name
        and name.splitlines() == name.split() == [name]
        and name.isascii()
        and name.isprintable()
        and 0 < len(name) <= MOST
    )


@given(
    st.one_of(
        st.text(), st.from_regex(r"[\w.\-\s/\\%:~]{0,140}"), st.lists(st.sampled_from(PARTS)).map("".join)
    )
)
@example("a\n")
@example("\uff41")
@example("a" * MOST)
def test_a_name_that_is_taken_stays_in_its_directory(name: str) -> None:
    assert not taken(name) or stays(name, Path("/runs"))


def test_of_a_hundred_thousand_hostile_names_none_leaves_its_directory(tmp_path: Path) -> None:
    draw, escaped, accepted = random.Random(0), [], 0
    for _ in range(100_000):
        name = "".join(draw.choices(PARTS, k=draw.randint(1, 4)))
        if taken(name):
            accepted += 1
            escaped += [] if stays(name, tmp_path) else [name]
    assert not escaped
    assert 100 < accepted < 50_000  # some are harmless, so that the test has seen both


@given(st.text(LETTERS + "._-", min_size=1, max_size=MOST))
def test_a_plain_word_is_taken_if_it_begins_with_a_letter_or_a_digit(name: str) -> None:
    assert taken(name) is (name[0] in LETTERS)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../x", "a/b", "a\\b", "C:", "a\n", "a b", "a" * (MOST + 1)]
)
def test_a_name_that_would_leave_is_refused(name: str) -> None:
    assert not taken(name)
