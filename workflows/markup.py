"""Pieces of a self-contained HTML page: its pictures are embedded as data URLs."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def bar(share: float, interval: Sequence[float] = ()) -> str:
    """A share, 0 to 1, as a bar, its interval as a thin line across the end."""
    low, high = interval or (share, share)
    line = f'<u style="left:{low:.2%};width:{high - low:.2%}"></u>' if interval else ""
    return f'<div class="bar"><i style="width:{share:.2%}"></i>{line}</div>'


def details(title: str, fields: Mapping[str, Any]) -> str:
    """Fields as JSON, folded under a title."""
    text = quoted(json.dumps(fields, indent=2, ensure_ascii=False))
    return f"<details><summary>{title}</summary><pre class=mono>{text}</pre></details>"


def figure(content: str, caption: str) -> str:
    """Content with a caption under it."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def strip(figures: Iterable[str]) -> str:
    """Figures in one row."""
    return f'<div class="strip">{"".join(figures)}</div>'


def image(data: bytes) -> str:
    """A picture whose pixels stay square when it is enlarged."""
    return f'<img class="crisp" alt="" src="{png(data)}">'


def png(data: bytes) -> str:
    """A PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def svg(text: str) -> str:
    """An SVG as a data URL."""
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"


def anchor(title: str) -> str:
    """The id of a title on the page, to link to."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def quoted(text: str) -> str:
    """Text with its markup characters escaped."""
    return html.escape(str(text), quote=True)
