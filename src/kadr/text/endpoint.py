"""The address of a chat endpoint and the key for it: what is a URL, and where a key may go."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from kadr.errors import RequestError

KEY_VARIABLE = "KADR_ENHANCE_KEY"  # where the command line finds the key in the environment
_COMPLETIONS = "/chat/completions"
_URL_EXAMPLE = "It looks like http://localhost:11434/v1."


def parse_endpoint_url(url: Any) -> SplitResult:
    """The parts of the URL of an endpoint.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        raise RequestError(f"the endpoint is {url!r}, which is no URL. {_URL_EXAMPLE}")
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc:  # not shown: it may hold a password
            raise RequestError(
                f"the URL of the endpoint names a user. Give a key in {KEY_VARIABLE} instead. {_URL_EXAMPLE}"
            )
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.fragment:
            return parts
    except RequestError:
        raise
    except ValueError:  # a port or an address that is none
        pass
    raise RequestError(f"the endpoint is {url!r}, which is no http or https URL. {_URL_EXAMPLE}")


def redact_url(url: str) -> str:
    """The endpoint as messages call it: without what its query may hold."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def completions_url(url: str) -> str:
    """Where it is asked: with /chat/completions once, however it was written."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix(_COMPLETIONS) + _COMPLETIONS
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def check_key(key: Any, url: SplitResult) -> None:
    """Refuse a key that is none, or that anyone on the way could read. It is in no message.

    Raises:
        RequestError: it is such a key.
    """
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
        raise RequestError(
            f"the key of the endpoint ({KEY_VARIABLE}) is empty, or holds what no key does, such as a space."
        )
    if url.scheme == "http" and not is_loopback(url.hostname):
        raise RequestError(
            f"the key is not sent to {url.hostname}: over http everyone on the way could read it. Use https, or a "
            f"tunnel to this machine; for an endpoint without keys, unset {KEY_VARIABLE}."
        )


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"
