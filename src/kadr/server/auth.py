"""Who may do what: named tokens, stored as hashes, and the clients that they stand for."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.regular_file import read_text
from kadr.validation import check_bool, check_range

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOKEN_VARIABLE = "KADR_TOKEN"  # environment variable: the one token of a server with one
MIN_TOKEN_CHARACTERS = 16
MAX_TOKENS_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"sha256", "admin", "max_queued"}


@dataclass(frozen=True)
class Client:
    """Whoever sends a request.

    Args:
        name: of the token; "" on a server without tokens.
        is_admin: sees and changes everyone's videos, and the queue.
        max_queued: jobs of it that may wait; None: as many as the queue has room for.
    """

    name: str = ""
    is_admin: bool = False
    max_queued: int | None = None

    @property
    def scope(self) -> str | None:
        """The owner whose jobs it sees; None: all."""
        return None if self.is_admin else self.name


LOCAL_CLIENT = Client(is_admin=True)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a server, as hashes. by_digest: SHA-256 of a token, in hexadecimal digits -> its client."""

    by_digest: Mapping[str, Client] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_digest)

    def find(self, token: str) -> Client | None:
        """Returns the client of a token, in a time that does not depend on how much of it is right."""
        digest, found = _digest(token), None
        for known, client in self.by_digest.items():
            if hmac.compare_digest(known, digest):
                found = client
        return found

    @classmethod
    def single(cls, token: str) -> Tokens:
        """Returns the tokens of a server with a single one, which is an admin's.

        Raises:
            RequestError: it is too short to be safe, or no header can have it.
        """
        if not token.isascii() or not token.isprintable() or token != token.strip():
            raise RequestError(
                "the token has spaces around it, or characters outside of ASCII, and no client can send it. Make one: "
                "kadr serve --new-token NAME."
            )
        if len(token) < MIN_TOKEN_CHARACTERS:
            raise RequestError(
                f"the token has {len(token)} characters; it must have at least {MIN_TOKEN_CHARACTERS}. "
                "Make one: kadr serve --new-token NAME."
            )
        return cls({_digest(token): Client("token", is_admin=True)})

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Reads a file of named tokens: TOML, a table for each, as `new_token` prints it.

        Raises:
            RequestError: it cannot be read, or has anything else in it.
        """
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if len(text) > MAX_TOKENS_BYTES:
            raise RequestError(f"{path} has more than {MAX_TOKENS_BYTES:,} characters, so it is not a file of tokens.")
        try:
            tables = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not TOML: {str(error).splitlines()[0]}. Correct it.") from error
        clients: dict[str, Client] = {}
        for name, table in tables.items():
            digest, client = _parse_client(path, name, table)
            if digest in clients:
                raise RequestError(f"{path}: {name} and {clients[digest].name} have the same token. Make another.")
            clients[digest] = client
        if not clients:
            raise RequestError(f"{path} has no tokens. Make one: kadr serve --new-token NAME.")
        return cls(clients)


def new_token(name: str, *, is_admin: bool = False) -> tuple[str, str]:
    """Returns a new token, and the lines for it in the file of tokens.

    Raises:
        RequestError: the name is none.
    """
    _check_name(name)
    token = secrets.token_urlsafe(32)
    admin = "admin = true\n" if is_admin else ""
    key = f'"{name}"' if "." in name else name  # in TOML a dot begins a table in a table
    return token, f'[{key}]\nsha256 = "{_digest(token)}"\n{admin}'


def _parse_client(path: Path, name: str, table: Any) -> tuple[str, Client]:
    _check_name(name)
    if not isinstance(table, dict) or table.keys() - _FIELDS or "sha256" not in table:
        raise RequestError(f"{path}: {name} must have sha256, and may have admin and max_queued, and nothing else.")
    digest = table["sha256"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise RequestError(f"{path}: the sha256 of {name} is {quote(digest)}; it must be 64 hexadecimal digits.")
    check_bool(f"admin of {name}", table.get("admin"))
    if (share := table.get("max_queued")) is not None:
        check_range(f"max_queued of {name}", share, 1, 10**6, is_whole=True)
    return digest, Client(name, bool(table.get("admin")), share)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RequestError(f"{quote(name)} is not the name of a token: letters, digits, dots and dashes, 64 at most.")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
