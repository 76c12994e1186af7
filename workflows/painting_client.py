"""Pictures asked of an endpoint over HTTP until they come: what it answers for each caption, or why not."""

import base64
import contextlib
import io
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dd_core.labels import UNLABELLED
from workflows.evaluation_spec import EvaluationSpec

log = logging.getLogger(__name__)
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
    cascade: str = ""
    """Digest of the cascade that painted it."""


class Wish(NamedTuple):
    """What a picture is asked for by."""

    caption: str
    label: int = UNLABELLED


class NoPainterError(ValueError):
    """No server that paints answers at this address."""


def answered(url: str, wishes: Sequence[Wish], spec: EvaluationSpec, *, digest: str = "") -> list[Answer]:
    """One picture of each caption and class, the first with the seed of the spec, the next with the next one.

    Args:
        url: Of the server.
        wishes: What to ask for.
        spec: How.
        digest: Of the cascade that is to answer; empty: any one.

    Raises:
        NoPainterError: Nothing answers there, or a server that paints no pictures, or another cascade.
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
        raise NoPainterError(f"{url} paints no pictures ({answers[0].failure}); {ADDRESS}")
    painters = {answer.cascade for answer in answers if not answer.failure}
    if len(painters | ({digest} - {""})) > 1:
        these = " and ".join(sorted(one[:12] or "another" for one in painters))
        wanted = f", {digest[:12]} was to be asked" if digest else ""
        raise NoPainterError(f"{url} was changed while it was asked: {these} painted{wanted}; ask again")
    return answers


def client_of(url: str, timeout_s: float) -> httpx.Client:
    """A client of an endpoint; one on this machine is reached without the proxies set, which do not know it.

    Args:
        url: Of the server, with or without the /v1 that clients of OpenAI append.
        timeout_s: Of each request.

    Raises:
        NoPainterError: The URL is not valid.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise NoPainterError(f"{url!r} is no address ({error}); {ADDRESS}") from None
    here = host == "localhost" or host.startswith("127.") or host == "::1"
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=not here)


def missing(answers: Sequence[Answer]) -> None:
    """Log how many pictures are missing, and why."""
    for failure, count in Counter(answer.failure for answer in answers if answer.failure).most_common():
        log.warning("%d of %d pictures are missing and count as wrong: %s", count, len(answers), failure)


def refuse_nobody(client: httpx.Client) -> None:
    """Check that the server answers, before hundreds of requests that would each wait for it to come back.

    Raises:
        NoPainterError: It does not answer.
    """
    try:
        client.get("/health/live")
    except httpx.TransportError as error:
        raise NoPainterError(
            f"{client.base_url} does not answer ({type(error).__name__}: {error}); {ADDRESS}"
        ) from None


def gone(client: httpx.Client, *, pause_s: float) -> bool:
    """Whether the server no longer answers, checked after a pause."""
    time.sleep(pause_s)
    try:
        refuse_nobody(client)
    except NoPainterError as error:
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
                picture = base64.b64decode(reply.json()["data"][0]["b64_json"])
                return Answer(picture, cascade=reply.headers.get("x-model-version", ""))
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


def pixels(png: bytes) -> NDArray[np.uint8]:
    """A PNG as [h, w, 3]."""
    return np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB"))
