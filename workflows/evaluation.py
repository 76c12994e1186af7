"""How good a served cascade is: it paints captions over HTTP; the oracle judges those of the embedded world.

A user's own captions are judged by a CLIP (workflows.clip_judge).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dd_core import metrics
from workflows.evaluation_spec import EvaluationSpec
from workflows.grammar import Case
from workflows.labels import label_of
from workflows.oracle import judged
from workflows.painting_client import NO_PICTURE, Answer, Wish, answered, computed_in, missing, pixels

GROUPS = ("one_object", "two_object", "unseen")
ATTRIBUTES = ("colour", "shape", "size", "place", "background", "count")
VERDICTS = "verdicts.jsonl"


class Verdict(NamedTuple):
    """The oracle's verdict on one picture."""

    group: str
    caption: str
    truth: dict[str, bool]
    failure: str


def evaluate_endpoint(
    url: str, spec: EvaluationSpec, *, keep: Path | None = None, digest: str = ""
) -> dict[str, Any]:
    """Paint every caption through an endpoint and judge the pictures.

    A request that fails is retried; if the last attempt fails too, its picture counts as one in which
    everything is wrong, and among `failed`.  None is left out.

    Args:
        url: Of the server, such as http://127.0.0.1:8000.
        spec: Which captions.
        keep: Directory for the pictures (00000.png and on) and verdicts.jsonl.
        digest: Of the cascade that is to paint them; empty: any one.

    Returns:
        Share right: all, one_object, two_object, unseen, each attribute; n; failed; intervals: name ->
        [low, high] at 95 %; precision (`computed_in`).

    Raises:
        NoPainterError: No server that paints answers there, or another cascade; nothing has been judged.
    """
    asked = spec.cases()
    wishes = [Wish(case.caption, label_of(case.meta, spec.label)) for case in asked]
    answers = answered(url, wishes, spec, digest=digest)
    if keep is not None:
        keep_pictures(keep, answers)
    verdicts = [verdict(case, answer) for case, answer in zip(asked, answers, strict=True)]
    missing(answers)
    if keep is not None:
        write_down(keep, [one._asdict() for one in verdicts])
    return scores(verdicts) | {"precision": computed_in(answers)}


def verdict(case: Case, answer: Answer) -> Verdict:
    """The oracle's verdict on an answer; without a readable picture, all that the caption says is wrong."""
    try:
        truth, failure = judged(pixels(answer.png), case.says), answer.failure
    except NO_PICTURE as error:  # no picture, or none that can be read
        nothing = judged(np.zeros((256, 256, 3), np.uint8), case.says)
        truth, failure = dict.fromkeys(nothing, False), answer.failure or f"unreadable picture: {error}"
    return Verdict(case.group, case.caption, truth, failure)


def scores(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares and intervals; an attribute is scored over the captions that state it."""
    marks: dict[str, list[bool]] = {"all": [one.truth["all"] for one in verdicts]}
    for group in GROUPS:
        marks[group] = [one.truth["all"] for one in verdicts if one.group == group]
    for attribute in ATTRIBUTES:
        marks[attribute] = [one.truth[attribute] for one in verdicts if attribute in one.truth]
    shares = {name: sum(found) / len(found) if found else None for name, found in marks.items()}
    intervals = {name: list(wilson(sum(found), len(found))) for name, found in marks.items() if found}
    failed = sum(bool(one.failure) for one in verdicts)
    return {**shares, "n": len(verdicts), "failed": failed, "intervals": intervals}


def wilson(right: int, count: int, z: float = metrics.NORMAL) -> tuple[float, float]:
    """Confidence interval of the share `right / count`, 95 % by default.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, spread = right / count, z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def keep_pictures(directory: Path, answers: Iterable[Answer]) -> None:
    """Write the pictures, for the report and for inspection; verdicts on earlier ones are removed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / VERDICTS).unlink(missing_ok=True)
    for number, answer in enumerate(answers):
        picture = directory / f"{number:05d}.png"
        picture.unlink(missing_ok=True)  # of an earlier evaluation
        if answer.png:
            picture.write_bytes(answer.png)


def write_down(directory: Path, verdicts: Iterable[Mapping[str, Any]]) -> None:
    """Write the verdict on each picture that is kept in a directory."""
    with (directory / VERDICTS).open("w") as file:
        for number, found in enumerate(verdicts):
            file.write(json.dumps({"picture": f"{number:05d}.png", **found}) + "\n")
