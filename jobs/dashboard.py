"""Requests to a cluster over HTTP: the API of Ray's dashboard, with the token of this user."""

import logging
import socket
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import httpx

from jobs import environment
from workflows.addresses import redacted

log = logging.getLogger(__name__)
TIMEOUT_S = 20.0
PUT_TIMEOUT_S = 180.0
"""The first Serve config is answered only when Serve has started; Ray gives its proxies 60 s for that."""


class DashboardError(ValueError):
    """The cluster does not answer, or refuses us; the message says what to do."""


class Answer(NamedTuple):
    """The reply to a request without a token."""

    status: int
    body: Any
    skew_s: float | None
    """How far the server's clock is ahead of ours; None: the reply has no date."""


class Dashboard:
    """The dashboard of a cluster.

    Args:
        address: Such as http://head:8265; it is shown the token of this user.
    """

    def __init__(self, address: str) -> None:
        refuse_misspelt(address)
        self.address = address.rstrip("/")
        token = environment.ray_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(base_url=self.address, headers=headers, timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """What is there, read from JSON.

        Raises:
            DashboardError: It does not answer, or not to us.
        """
        return self.answered(self.client.build_request("GET", path, params=query)).json()

    def put(self, path: str, body: Any) -> None:
        """Change what is there.

        Raises:
            DashboardError: As above, or it refuses.
        """
        self.answered(self.client.build_request("PUT", path, json=body, timeout=PUT_TIMEOUT_S))

    def answered(self, request: httpx.Request) -> httpx.Response:
        """The reply to a request; raises DashboardError unless its status is 200."""
        try:
            reply = self.client.send(request)
        except httpx.HTTPError as error:
            why = f"{type(error).__name__}: {error}"
            raise DashboardError(
                f"{self.address} does not answer ({why}); is the cluster up and its dashboard within reach?"
            ) from None
        if reply.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            shown = "Authorization" in self.client.headers
            raise DashboardError(not_let_in(self.address, reply.status_code, shown=shown))
        if reply.status_code != httpx.codes.OK:
            last = (reply.text.strip().splitlines() or [""])[-1]  # of a traceback
            raise DashboardError(f"{self.address}{request.url.path} says {reply.status_code}: {last:.300}")
        return reply


def refuse_misspelt(address: str) -> None:
    """Raises DashboardError if no dashboard can have such an address."""
    try:
        url = httpx.URL(address)
        why = "" if is_dashboard(address) else " (it is not of HTTP)"
        why = " (leave out what follows `#` or `?`)" if url.fragment or url.query else why
    except httpx.InvalidURL as error:
        why = f" ({error})"
    if why:
        fix = "give one such as http://HEAD:8265 in RAY_ADDRESS, or as --address"
        raise DashboardError(f"{redacted(address)!r} is no address of a dashboard{why}; {fix}")


def not_let_in(address: str, status: int, *, shown: bool) -> str:
    """What happened, and the fix; Ray answers 401 without a token, 403 to a wrong one."""
    fix = "set RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names, to the token of this cluster"
    if shown:
        return f"{address} answers {status}: the token from {environment.token_source()} is wrong; {fix}"
    return f"{address} answers {status}: no token was shown; {fix}"


def is_dashboard(address: str) -> bool:
    """Whether an address is one of HTTP."""
    return address.startswith(("http://", "https://"))


def is_here(address: str) -> bool:
    """Whether an address is of this machine: a socket can be bound to its host."""
    try:
        family, *_, place = socket.getaddrinfo(urlsplit(address).hostname, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def refuse_open(address: str, *, unless: str = "say --insecure") -> None:
    """Refuse a cluster that runs code for anybody; if it is on this machine, only warn.

    Args:
        address: Of its dashboard.
        unless: How a user allows it, for the message.

    Raises:
        DashboardError: It is elsewhere and asks nobody for a token, or does not answer.
    """
    refuse_misspelt(address)
    here = is_here(address)
    try:
        status = without_token(f"{address.rstrip('/')}/api/version").status
    except DashboardError:
        if here:  # the next request says so
            return
        raise
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN) or (here and status != httpx.codes.OK):
        return
    if status != httpx.codes.OK:
        raise DashboardError(
            f"{address}/api/version says {status} to who shows no token, which is neither yes nor no; give "
            f"the dashboard itself, such as http://HEAD:8265, with nothing that answers for it, or {unless}"
        )
    says = (
        f"{address} runs code for anybody who reaches it: start it with RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN (KubeRay: authOptions.mode: token)"
    )
    if not here:
        raise DashboardError(f"{says}, or {unless}")
    log.warning("%s; it is of this machine, unless a tunnel leads elsewhere", says)


def without_token(url: str, *, user: tuple[str, str] | None = None) -> Answer:
    """The reply to a request without a token, and how far the server's clock is off.

    Args:
        url: Where.
        user: Name and password, for a server that has users; None: a stranger.

    Raises:
        DashboardError: Nobody answers.
    """
    before = time.time()
    try:
        reply = httpx.get(url, auth=user, timeout=TIMEOUT_S)
    except httpx.InvalidURL as error:
        told = f"{redacted(url)!r} is no address of a dashboard or a server ({error}); see how it is spelt"
        raise DashboardError(told) from None
    except httpx.HTTPError as error:
        host, why = urlsplit(url).netloc.rpartition("@")[2], f"{type(error).__name__}: {error}"
        raise DashboardError(f"{host} does not answer ({why}); is it up, and reachable from here?") from None
    middle = (before + time.time()) / 2
    said = reply.headers.get("date")
    skew = parsedate_to_datetime(said).timestamp() + 0.5 - middle if said else None  # Date has whole seconds
    try:
        return Answer(reply.status_code, reply.json(), skew)
    except ValueError:
        return Answer(reply.status_code, reply.text, skew)
