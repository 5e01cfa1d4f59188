"""Addresses without the secrets that may stand in them, for whatever is shown, logged or stored.

A secret comes into an address in two ways: `scheme://USER:PASSWORD@host/…` and `…?secret_key=…`. Where an address may
hold one (MLFLOW_TRACKING_URI), it is used as it was given and shown, compared and stored without it.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

PARAMETER = re.compile("[&;]?[^&;]+|[&;]")
# with one slash too: what is left of an address that was taken for a path
ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*:/[^\s'\"<>`]+")
# whole words of a parameter's name, so that keyspace= and author= are none
SECRET_PARAMETER = re.compile(
    r"(^|[_\-.])(pass(word|wd|phrase)?|pwd|secret|token|credentials?|key|keyid|sig|signature|auth|authorization)"
    r"($|[_\-.])|password|secret|token|credential|signature|(api|access|account)_?key",
    re.IGNORECASE,
)
USER_ONLY_IS_SECRET = ("http", "https")  # https://TOKEN@host; elsewhere (abfs://container@account) it is a name


class Login(NamedTuple):
    """A user's name and password."""

    user: str
    password: str


def without_credentials(address: str) -> str:
    """The address without password, user name beside it, and parameters that are named like secrets.

    An address without them, and a path, comes back as it is.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    _, rest = _split_login(scheme, rest)
    rest, hash_sign, fragment = rest.partition("#")
    place, _, query = rest.partition("?")
    if any(_is_secret(parameter) for parameter in PARAMETER.findall(query)):
        query = "".join(p for p in PARAMETER.findall(query) if not _is_secret(p)).lstrip("&;")
    return f"{scheme}://{place}" + (f"?{query}" if query else "") + hash_sign + fragment


def redacted(text: str) -> str:
    """The text with every address in it `without_credentials`."""
    return ADDRESS.sub(lambda found: _clean(found.group()), text)


def _clean(address: str) -> str:
    if "://" in address:
        return without_credentials(address)
    return without_credentials(address.replace(":/", "://", 1)).replace("://", ":/", 1)


def login_in(address: str) -> Login | None:
    """The user name and password in an address, percent signs decoded; None where it holds no password."""
    scheme, separator, rest = address.partition("://")
    login = _split_login(scheme, rest)[0] if separator else ""
    user, colon, password = login.partition(":")
    return Login(unquote(user), unquote(password)) if colon else None


def _split_login(scheme: str, rest: str) -> tuple[str, str]:
    """What stands after `://` as (USER:PASSWORD, the rest); the first is empty where there is no secret in it.

    A password should have its / ? # @ percent-encoded, and people forget it. So where a colon is followed by what
    is no port, all up to the last @ of the whole address is taken for the password: too much rather than too little.
    """
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    after_colon = authority.partition(":")[2]
    in_brackets = authority.startswith("[")  # an IPv6 address
    if "@" in rest and after_colon and not after_colon.isdigit() and not in_brackets:
        authority = rest
    if "@" not in authority:
        return "", rest
    login, _, host = authority.rpartition("@")
    if ":" not in login and scheme.lower() not in USER_ONLY_IS_SECRET:
        return "", rest
    return login, host + rest[len(authority) :]


def _is_secret(parameter: str) -> bool:
    return bool(SECRET_PARAMETER.search(unquote(parameter.lstrip("&;").partition("=")[0])))
