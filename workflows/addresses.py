"""Addresses as others may see them: what is printed, logged, kept and sent names no user and no password.

An address may carry its right of access behind the question mark: those that a store has signed
(X-Amz-Signature, X-Goog-Signature, sig), tokens, passwords of databases.  So what is shown ends there.
"""

import re

USER = re.compile(r'(?<=://)[^/?#\s"]*@')
QUERY = re.compile(r"""(://[^\s"'?]*)\?[^\s"'=]*=[^\s"']*[^\s"',;:.)\]]""")
"""Not the question mark of a pattern: it is followed by a name and a value."""
PASSWORD = re.compile(r'://[^/?#\s"]*:[^/?#\s"]+@')
RIGHT = re.compile(
    r"""://[^\s"']*[?&;](?:sig|auth|[^=&;\s"']*(?:key|keyid|token|secret|signature|credential"""
    r"""|password|passwd|pwd))=[^&;\s"']""",
    re.IGNORECASE,
)


def shown(text: str) -> str:
    """An address, or a text that has some in it, without the users, passwords and queries."""
    return QUERY.sub(r"\1", USER.sub("", text))


def has_password(text: str) -> bool:
    """Whether an address in this text has one, or another secret in its query."""
    return bool(PASSWORD.search(text) or RIGHT.search(text))
