"""The SQLite database of a queue: one table, with its schema number; opened, upgraded, or set aside where damaged."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import RLock

from kadr.errors import KadrWarning
from kadr.file_names import replace_file
from kadr.jobs.job import StorageError
from kadr.version import __version__

SCHEMA_NUMBER = 1
# WAL has a race in older versions that can damage a database with two connections; see https://sqlite.org/wal.html.
_WAL_FIXED_IN = (3, 51, 3)
_WAL_FIXED_PATCH = {(3, 44): 6, (3, 50): 7}  # of versions that got the fix later
_BUSY_SECONDS = 10.0  # to wait for a backup program that reads the file

_CREATE = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
    priority INTEGER NOT NULL,
    position REAL NOT NULL,
    passed INTEGER NOT NULL DEFAULT 0,
    engine TEXT NOT NULL,
    request TEXT NOT NULL,
    labels TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    attempt INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    worker_losses INTEGER NOT NULL DEFAULT 0,
    server_losses INTEGER NOT NULL DEFAULT 0,
    seq INTEGER NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    is_deleted INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    result TEXT,
    size_bytes INTEGER NOT NULL DEFAULT 0,
    idempotency_key TEXT,
    idempotency_digest TEXT,
    CHECK ((status = 'completed') = (result IS NOT NULL)),
    CHECK ((status = 'failed') = (error IS NOT NULL))
);
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
"""


class Database:
    """A connection that threads share, one transaction at a time.

    Args:
        path: of the file; made where it is missing.

    Raises:
        StorageError: the file cannot be opened, or a newer kadr wrote it. It is left as it is.

    Attributes:
        is_new: the file was made, because there was none or because it was damaged and set aside.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, RLock()
        self.is_new = not path.exists()
        if not self.is_new and (reason := _find_damage(path)) is not None:
            _set_aside(path, reason)
            self.is_new = True
        with _explain_errors(path):
            self._connection = _connect(path)
            self._create_or_upgrade()

    def _create_or_upgrade(self) -> None:
        (number,) = self._connection.execute("PRAGMA user_version").fetchone()
        if number > SCHEMA_NUMBER:
            self._connection.close()
            raise StorageError(
                f"the queue in {self.path} has the schema number {number}; kadr {__version__} reads numbers up to "
                f"{SCHEMA_NUMBER}. A newer kadr wrote it: update kadr, or choose another folder."
            )
        if number == 0:
            self._connection.executescript(f"BEGIN;{_CREATE}PRAGMA user_version = {SCHEMA_NUMBER};COMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Runs the block as one transaction that writes: all of it is on disk when the block ends, or nothing.

        Raises:
            StorageError: the disk is full, or the file cannot be written.
        """
        with self._lock, _explain_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it already
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, values: object = ()) -> list[sqlite3.Row]:
        """Returns the rows of a query that only reads.

        Raises:
            StorageError: the file cannot be read.
        """
        with self._lock, _explain_errors(self.path):
            return self._connection.execute(query, values).fetchall()  # type: ignore[arg-type]

    def restore_if_deleted(self) -> bool:
        """Writes the database anew where somebody deleted its file, from what this connection still reads.

        Returns:
            True if the file was gone.

        Raises:
            StorageError: it cannot be written.
        """
        with self._lock, _explain_errors(self.path):
            if self.path.exists():
                return False
            restored = self.path.with_suffix(".restored")
            restored.unlink(missing_ok=True)
            with closing(sqlite3.connect(restored)) as target:
                self._connection.backup(target)
            self._connection.close()
            replace_file(restored, self.path)
            self._connection = _connect(self.path)
            return True

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")  # an accepted job survives a power cut
    connection.execute(f"PRAGMA journal_mode = {'WAL' if _is_wal_safe(sqlite3.sqlite_version_info) else 'TRUNCATE'}")
    return connection


def _is_wal_safe(version: tuple[int, ...]) -> bool:
    """Tells whether this version of SQLite has the fix of WAL's reset race."""
    major, minor, patch = version[:3]
    fixed_patch = _WAL_FIXED_PATCH.get((major, minor))
    return (major, minor, patch) >= _WAL_FIXED_IN or (fixed_patch is not None and patch >= fixed_patch)


def _find_damage(path: Path) -> str | None:
    """Returns what is wrong with a database file, or None."""
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection:
            ((verdict, *_),) = connection.execute("PRAGMA quick_check(1)").fetchall()
            (number,) = connection.execute("PRAGMA user_version").fetchone()
            if verdict == "ok" and number == SCHEMA_NUMBER:
                connection.execute("SELECT id, seq FROM jobs LIMIT 1").fetchall()
            return None if verdict == "ok" else str(verdict)
    except sqlite3.DatabaseError as error:
        if _is_refused_by_system(error):
            raise StorageError(f"the queue in {path} cannot be opened: {error}. Make it readable.") from error
        return str(error)


def _set_aside(path: Path, reason: str) -> None:
    """Renames a damaged database, with its journal, to a name that is free."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    replace_file(path, aside)
    for ending in ("-journal", "-wal", "-shm"):
        if (journal := path.with_name(path.name + ending)).exists():
            replace_file(journal, aside.with_name(aside.name + ending))
    warnings.warn(
        KadrWarning(
            f"the queue in {path} is damaged ({reason}). It is kept as {aside.name}; a new one begins, with the "
            "finished videos that are found beside it."
        ),
        stacklevel=2,
    )


def _is_refused_by_system(error: sqlite3.Error) -> bool:
    """Tells whether the system refused to open or write a file, rather than the file being damaged."""
    return isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error)


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a bug, or what a caller handles
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"the queue in {path} cannot be used: {error}. Check the disk's free space and the file's permissions."
        ) from error
