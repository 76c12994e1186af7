"""Pieces of a page that needs nothing but itself: pictures are part of it, as addresses that hold them."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def bar(share: float, interval: Sequence[float] = ()) -> str:
    """A share of one as a bar, its interval as a thin line across the end."""
    low, high = interval or (share, share)
    line = f'<u style="left:{low:.2%};width:{high - low:.2%}"></u>' if interval else ""
    return f'<div class="bar"><i style="width:{share:.2%}"></i>{line}</div>'


def details(title: str, fields: Mapping[str, Any]) -> str:
    """JSON, folded away."""
    text = quoted(json.dumps(fields, indent=2, ensure_ascii=False))
    return f"<details><summary>{title}</summary><pre class=mono>{text}</pre></details>"


def figure(content: str, caption: str) -> str:
    """Something with words under it."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def strip(figures: Iterable[str]) -> str:
    """Figures in one row."""
    return f'<div class="strip">{"".join(figures)}</div>'


def image(data: bytes) -> str:
    """A picture whose pixels stay square when it is enlarged."""
    return f'<img class="crisp" alt="" src="{png(data)}">'


def png(data: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def svg(text: str) -> str:
    """An SVG as an address that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"


def anchor(title: str) -> str:
    """Where a title is found on the page."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def quoted(text: str) -> str:
    """Text that is not markup."""
    return html.escape(str(text), quote=True)
