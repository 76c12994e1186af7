"""Addresses as others may see them: what is printed, logged, kept and sent names no user and no password.

The query of an address may hold credentials: signatures of stores (X-Amz-Signature, X-Goog-Signature, sig),
tokens, passwords of databases.  So an address is shown without its query.
"""

import re

USER = re.compile(r'(?<=://)[^/?#\s"]*@')
QUERY = re.compile(r"""(://[^\s"'?]*)\?[^\s"'=]*=[^\s"']*[^\s"',;:.)\]]""")
"""A question mark in a glob pattern does not match: no name and value follow it."""
PASSWORD = re.compile(r'://[^/?#\s"]*:[^/?#\s"]+@')
RIGHT = re.compile(
    r"""://[^\s"']*[?&;](?:sig|auth|[^=&;\s"']*(?:key|keyid|token|secret|signature|credential"""
    r"""|password|passwd|pwd))=[^&;\s"']""",
    re.IGNORECASE,
)
SIGNATURE = re.compile(r"x-(?:amz|goog|oss)-signature|signature|sig", re.IGNORECASE)
SIGNED = re.compile(
    r"x-(?:amz|goog|oss)-.*|signature|expires|(?:aws|oss)accesskeyid|googleaccessid|key-pair-id|policy"
    r"|security-token|hash-algorithm|sig|s[evptrs]|spr|srt|sip|ske|skt|sks|skv|skoid|sktid",
    re.IGNORECASE,
)
"""Parameters that stores make anew for each reader beside a SIGNATURE: Amazon's, Google's, CloudFront's,
Alibaba's, Azure's."""


def lasting(url: str) -> str:
    """An address without what is signed anew each time: the same file keeps the same one."""
    path, _, query = url.partition("?")
    fields = [(field.partition("=")[0], field) for field in query.split("&")]
    if "://" not in path or not any(SIGNATURE.fullmatch(name) for name, _ in fields):
        return url
    kept = "&".join(field for name, field in fields if not SIGNED.fullmatch(name))
    return f"{path}?{kept}" if kept else path


def redacted(text: str) -> str:
    """An address, or a text that has some in it, without the users, passwords and queries."""
    return QUERY.sub(r"\1", USER.sub("", text))


def has_password(text: str) -> bool:
    """Whether an address in this text has a password, or another secret in its query."""
    return bool(PASSWORD.search(text) or RIGHT.search(text))
