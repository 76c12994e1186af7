"""How good a served cascade is: it paints captions over HTTP; the oracle judges those of the embedded world.

A user's own captions are judged by a CLIP (workflows.clip_judge).
"""

import base64
import contextlib
import io
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dd_core import metrics
from dd_core.labels import UNLABELLED
from workflows.evaluation_spec import EvaluationSpec
from workflows.grammar import Case
from workflows.labels import label_of
from workflows.oracle import judged

log = logging.getLogger(__name__)
GROUPS = ("one_object", "two_object", "unseen")
ATTRIBUTES = ("colour", "shape", "size", "place", "background", "count")
VERDICTS = "verdicts.jsonl"
BUSY = (429, 503)
ROUNDS, PAUSE_S = 3, 5.0
"""Rounds of requests, each for the pictures still missing, and the pause before each round but the first."""
NOT_THERE = f"HTTP {httpx.codes.NOT_FOUND}"
ADDRESS = "give the address that `ddiff serve` or `ddiff deploy` has said"
NO_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors of Pillow by which bytes are no picture, or none that can be read."""
LOST_S = 60.0
"""How long one picture, of hundreds, waits for a server that cannot be reached."""


class Answer(NamedTuple):
    """What came back for one caption."""

    png: bytes
    """Empty if nothing did."""
    failure: str = ""
    refused: bool = False
    """Whether the request was at fault, so that a retry would change nothing."""


class Wish(NamedTuple):
    """What a picture is asked for by."""

    caption: str
    label: int = UNLABELLED


class EndpointError(ValueError):
    """No server that paints answers at this address."""


class Verdict(NamedTuple):
    """The oracle's verdict on one picture."""

    group: str
    caption: str
    truth: dict[str, bool]
    failure: str


def evaluate_endpoint(url: str, spec: EvaluationSpec, *, keep: Path | None = None) -> dict[str, Any]:
    """Paint every caption through an endpoint and judge the pictures.

    A request that fails is retried; if the last attempt fails too, its picture counts as one in which
    everything is wrong, and among `failed`.  None is left out.

    Args:
        url: Of the server, such as http://127.0.0.1:8000.
        spec: Which captions.
        keep: Directory for the pictures (00000.png and on) and verdicts.jsonl.

    Returns:
        Share right: all, one_object, two_object, unseen, each attribute; n; failed; intervals: name ->
        [low, high] at 95 %; precision (`computed_in`).

    Raises:
        EndpointError: No server that paints answers there; nothing has been judged.
    """
    asked = spec.cases()
    answers = answered(url, [Wish(case.caption, label_of(case.meta, spec.label)) for case in asked], spec)
    if keep is not None:
        keep_pictures(keep, answers)
    verdicts = [verdict(case, answer) for case, answer in zip(asked, answers, strict=True)]
    missing(answers)
    if keep is not None:
        write_down(keep, [one._asdict() for one in verdicts])
    return scores(verdicts) | {"precision": computed_in(answers)}


def computed_in(answers: Iterable[Answer]) -> str:
    """The precision noted in the pictures: bf16, fp32, or both as bf16+fp32; empty if they note none."""
    told: set[str] = set()
    for answer in answers:
        with (
            contextlib.suppress(*NO_PICTURE),
            Image.open(io.BytesIO(answer.png), formats=("PNG",)) as picture,
        ):
            told |= set(str(picture.info.get("precision", "")).split("+"))
    return "+".join(sorted(told - {""}))


def answered(url: str, wishes: Sequence[Wish], spec: EvaluationSpec) -> list[Answer]:
    """One picture of each caption and class, the first with the seed of the spec, the next with the next one.

    Raises:
        EndpointError: Nothing answers there, or a server that paints no pictures.
    """
    with (
        client_of(url, spec.timeout_s) as client,
        ThreadPoolExecutor(spec.concurrency) as pool,
    ):
        refuse_nobody(client)
        answers = [Answer(b"", "not asked")] * len(wishes)
        for turn in range(ROUNDS):
            left = [number for number, answer in enumerate(answers) if answer.failure and not answer.refused]
            if turn and (not left or gone(client, pause_s=PAUSE_S)):
                break
            found = pool.map(lambda n: painted(client, wishes[n], spec.seed + n, spec), left)
            for number, answer in zip(left, found, strict=True):
                answers[number] = answer
    if all(answer.failure.startswith(NOT_THERE) for answer in answers):
        raise EndpointError(f"{url} paints no pictures ({answers[0].failure}); {ADDRESS}")
    return answers


def client_of(url: str, timeout_s: float) -> httpx.Client:
    """A client of an endpoint; one on this machine is reached without the proxies set, which do not know it.

    Args:
        url: Of the server, with or without the /v1 that clients of OpenAI append.
        timeout_s: Of each request.

    Raises:
        EndpointError: The URL is not valid.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise EndpointError(f"{url!r} is no address ({error}); {ADDRESS}") from None
    here = host == "localhost" or host.startswith("127.") or host == "::1"
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=not here)


def missing(answers: Sequence[Answer]) -> None:
    """Log how many pictures are missing, and why."""
    for failure, count in Counter(answer.failure for answer in answers if answer.failure).most_common():
        log.warning("%d of %d pictures are missing and count as wrong: %s", count, len(answers), failure)


def refuse_nobody(client: httpx.Client) -> None:
    """Check that the server answers, before hundreds of requests that would each wait for it to come back.

    Raises:
        EndpointError: It does not answer.
    """
    try:
        client.get("/health/live")
    except httpx.TransportError as error:
        raise EndpointError(
            f"{client.base_url} does not answer ({type(error).__name__}: {error}); {ADDRESS}"
        ) from None


def gone(client: httpx.Client, *, pause_s: float) -> bool:
    """Whether the server no longer answers, checked after a pause."""
    time.sleep(pause_s)
    try:
        refuse_nobody(client)
    except EndpointError as error:
        log.warning("%s", error)
        return True
    return False


def painted(client: httpx.Client, wish: Wish, seed: int, spec: EvaluationSpec) -> Answer:
    """One picture; asked for again while the server is busy or cannot be reached, until the time is up."""
    deadline = time.monotonic() + spec.timeout_s
    lost = math.inf
    body: dict[str, Any] = {"prompt": wish.caption, "n": 1, "seed": seed, "response_format": "b64_json"}
    body |= {} if wish.label == UNLABELLED else {"label": wish.label}
    while True:
        try:
            reply = client.post("/v1/images/generations", json=body)
            lost = math.inf
            if reply.status_code == httpx.codes.OK:
                return Answer(base64.b64decode(reply.json()["data"][0]["b64_json"]))
            failure, again = f"HTTP {reply.status_code}: {reply.text:.200}", reply.status_code in BUSY
            if reply.is_client_error and not again:
                return Answer(b"", failure, refused=True)
            pause = retry_after(reply.headers)
        except httpx.HTTPError as error:
            failure, again, pause = f"{type(error).__name__}: {error}", True, 1.0
            lost = min(lost, time.monotonic())
        except (ValueError, LookupError) as error:
            return Answer(b"", f"answer without a picture: {error!r}")
        if not again or time.monotonic() + pause > min(deadline, lost + LOST_S):
            return Answer(b"", failure)
        time.sleep(pause)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the server's Retry-After header, 0.05 to 30; 1 if it has none, 5 if it is a date."""
    try:
        return min(30.0, max(0.05, float(headers.get("retry-after", "1"))))
    except ValueError:  # a date
        return 5.0


def verdict(case: Case, answer: Answer) -> Verdict:
    """The oracle's verdict on an answer; without a readable picture, all that the caption says is wrong."""
    try:
        truth, failure = judged(pixels(answer.png), case.says), answer.failure
    except NO_PICTURE as error:  # no picture, or none that can be read
        nothing = judged(np.zeros((256, 256, 3), np.uint8), case.says)
        truth, failure = dict.fromkeys(nothing, False), answer.failure or f"unreadable picture: {error}"
    return Verdict(case.group, case.caption, truth, failure)


def pixels(png: bytes) -> NDArray[np.uint8]:
    """A PNG as [h, w, 3]."""
    return np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB"))


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
