"""URL and API key of a chat endpoint: which URLs are accepted, and where a key may be sent."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from kadr.errors import RequestError
from kadr.quoting import quote

KEY_VARIABLE = "KADR_ENHANCE_KEY"  # the environment variable that the command line reads the key from
_COMPLETIONS = "/chat/completions"
_URL_EXAMPLE = "It looks like http://localhost:11434/v1."


def parse_endpoint_url(url: Any) -> SplitResult:
    """Returns the parts of an endpoint's URL.

    Raises:
        RequestError: it is not an http or https URL, or contains a user name.
    """
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        raise RequestError(f"the endpoint is {quote(url)}, which is not a URL. {_URL_EXAMPLE}")
    try:
        parts = urlsplit(url)
        _refuse_user_name(parts)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.fragment:
            return parts
    except RequestError:
        raise
    except ValueError:  # an invalid port or address
        pass
    raise RequestError(f"the endpoint is {quote(url)}, which is not an http or https URL. {_URL_EXAMPLE}")


def _refuse_user_name(parts: SplitResult) -> None:
    if "@" in parts.netloc:  # not repeated: it may contain a password
        raise RequestError(
            f"the URL of the endpoint contains a user name. Give a key in {KEY_VARIABLE} instead. {_URL_EXAMPLE}"
        )


def redact_url(url: str) -> str:
    """Returns the URL for messages: without its query, which may contain secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def completions_url(url: str) -> str:
    """Returns the URL of chat completions: ends in /chat/completions, with or without it in `url`."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix(_COMPLETIONS) + _COMPLETIONS
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def check_key(key: Any, url: SplitResult) -> None:
    """Refuses a key that is malformed, or that would be sent unencrypted to another machine.

    Raises:
        RequestError: it is such a key. The message does not contain it.
    """
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
        raise RequestError(
            f"the key of the endpoint ({KEY_VARIABLE}) is empty, or contains what no key does, such as a space."
        )
    if url.scheme == "http" and not is_loopback(url.hostname):
        raise RequestError(
            f"the key is not sent to {url.hostname}: over http everyone on the way could read it. Use https, or a "
            f"tunnel to this machine; for an endpoint without keys, unset {KEY_VARIABLE}."
        )


def is_loopback(host: str | None) -> bool:
    """Tells if a host is this machine."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"
