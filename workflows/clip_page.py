"""The report's section on how a CLIP scores pictures painted from a user's own captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflows.markup import bar, figure, png, quoted

FOUND = {"cosine": ("cosine", ".3f"), "r_precision": ("R-precision", ".1%")}
"""Score -> its name on the page, and its format."""


def note(clip: Mapping[str, Any]) -> str:
    """What the figures mean, and how far to trust them."""
    seen = "no stage was trained on" if clip["held_out"] else "it was trained on: nothing is held out"
    judge = (
        "The CLIP is the one that the cascade was trained with, and has taught it what it likes: these "
        "figures flatter, and one of another origin (evaluation.judge) would judge better."
        if clip["judge"]["taught"]
        else f"The CLIP is {quoted(clip['judge']['name'])}, with which it was not trained."
    )
    said = (
        f"{clip['n']:,} captions of its own data that {seen}; painted over HTTP. {judge} R-precision is the "
        f"share of pictures that are nearer to their own caption than to {clip['among'] - 1:,} others, "
        f"{1 / clip['among']:.1%} by chance. What the true pictures of these captions reach is the most to "
        "hope for."
    )
    if clip.get("failed"):
        said += f" {clip['failed']:,} pictures did not come and count as wrong: this is no judgement."
    return said


def table(clip: Mapping[str, Any]) -> str:
    """Each figure, of the painted and of the true pictures."""
    head = "<tr><th></th><th></th><th class=number>value</th><th class=number>95 % interval</th></tr>"
    rows = [
        row(f"{title}, {whose} pictures", clip[key], clip["intervals"][key], shown)
        for name, (title, shown) in FOUND.items()
        for whose, key in (("painted", name), ("true", f"true_{name}"))
    ]
    return f"<table>{head}{''.join(rows)}</table>"


def row(title: str, value: float, interval: Sequence[float], shown: str) -> str:
    """One figure with its interval, as numbers and as a bar from 0 to 1."""
    low, high = interval
    drawn = bar(inside(value), (inside(low), inside(high)))
    return (
        f"<tr><td>{title}</td><td>{drawn}</td><td class=number>{value:{shown}}</td>"
        f"<td class=number>{low:{shown}} to {high:{shown}}</td></tr>"
    )


def inside(value: float) -> float:
    """Within 0 to 1."""
    return min(1.0, max(0.0, value))


def grid(evaluation: Path, verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Pictures that were judged, the true one in the corner of each; empty if none were kept."""
    if not verdicts:
        return ""
    cells = "".join(cell(evaluation, one) for one in verdicts)
    head = (
        f"{len(verdicts)} of them, evenly chosen; inset the true picture, then cosines, its own in brackets"
    )
    return f'<h3>{head}</h3><div class="grid">{cells}</div>'


def cell(evaluation: Path, one: Mapping[str, Any]) -> str:
    """A picture and its caption, and whether the picture is nearest to it."""
    painted = evaluation / one["picture"]
    true = painted.with_name(f"{painted.stem}-true.png")
    inset = f'<img class="inset" alt="" src="{png(true.read_bytes())}">' if true.exists() else ""
    shown = (
        f'<div class="pair"><img alt="" src="{png(painted.read_bytes())}">{inset}</div>'
        if painted.exists()
        else "<p>no picture came</p>"
    )
    mark = '<span class="right">✓</span>' if one["nearest"] else '<span class="wrong">✗</span>'
    return figure(shown, f"{quoted(one['caption'])} {mark} {one['cosine']:.3f} ({one['true_cosine']:.3f})")
