"""Addresses as others may see them: what is printed, logged and sent names no user and no password."""

import re

USER = re.compile(r'(?<=://)[^/?#\s"]*@')
PASSWORD = re.compile(r'://[^/?#\s"]*:[^/?#\s"]+@')


def shown(text: str) -> str:
    """An address, or a text that has some in it, without the users and passwords."""
    return USER.sub("", text)


def has_password(text: str) -> bool:
    """Whether an address in this text has one."""
    return bool(PASSWORD.search(text))
