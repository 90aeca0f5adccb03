"""Signed addresses of media: whoever has one may fetch that one thing, for a while, without a token."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from kadr.atomic_write import atomic_file

SECRET_FILE, SECRET_BYTES = "secret", 32
DEFAULT_SECONDS = 3600


@dataclass(frozen=True)
class UrlSigner:
    """Signs paths.

    Args:
        secret: that of the server.
        seconds: how long an address is good.
        clock: seconds since 1970.
    """

    secret: bytes
    seconds: int = DEFAULT_SECONDS
    clock: Callable[[], float] = time.time

    @classmethod
    def open(cls, folder: Path, seconds: int = DEFAULT_SECONDS) -> UrlSigner:
        """Reads the secret of a queue's folder, or makes it: addresses stay good when the server is started again."""
        path = folder / SECRET_FILE
        secret = path.read_bytes() if path.is_file() else b""
        if len(secret) != SECRET_BYTES:
            secret = secrets.token_bytes(SECRET_BYTES)
            with atomic_file(path, fsync=True) as file:
                if hasattr(os, "fchmod"):
                    os.fchmod(file.fileno(), 0o600)
                file.write(secret)
        return cls(secret, seconds)

    def sign(self, path: str, **query: str) -> str:
        """Returns a path with its query, when it expires, and the signature of all that."""
        values = {**query, "expires": str(int(self.clock()) + self.seconds)}
        return f"{path}?{urlencode({**values, 'signature': self._signature(path, values)})}"

    def is_valid(self, path: str, query_string: bytes) -> bool:
        """Tells whether a path and its query were signed here, unaltered, and have not expired."""
        pairs = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)
        values = dict(pairs)
        if len(values) != len(pairs):  # another reader of a name that is there twice may take the other value
            return False
        signature, expires = values.pop("signature", ""), values.get("expires", "")
        is_genuine = hmac.compare_digest(self._signature(path, values).encode(), signature.encode())
        return is_genuine and expires.isdecimal() and self.clock() < int(expires)

    def _signature(self, path: str, values: dict[str, str]) -> str:
        message = f"{path}?{urlencode(sorted(values.items()))}"
        return hmac.new(self.secret, message.encode(), hashlib.sha256).hexdigest()
