"""The SQLite database of a queue: a table of jobs, with its schema number; opened, or set aside where it is damaged."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from kadr.errors import KadrWarning
from kadr.file_names import replace_file
from kadr.jobs.job import StorageError
from kadr.regular_file import open_regular
from kadr.schema import JOBS_DATABASE_NUMBER
from kadr.version import __version__

# WAL has a race in older versions that can damage a database with two connections; see https://sqlite.org/wal.html.
_WAL_FIXED_IN = (3, 51, 3)
_WAL_FIXED_PATCH = {(3, 44): 6, (3, 50): 7}  # of versions that got the fix later
_BUSY_SECONDS = 10.0  # to wait for a backup program that reads the file
_MAGIC, _NUMBER_BYTES = b"SQLite format 3\0", slice(60, 64)  # of a file; see https://sqlite.org/fileformat.html
_DAMAGE = ("malformed", "not a database", "Could not decode", "no such table", "no such column")

_CREATE = """
CREATE TABLE IF NOT EXISTS jobs (
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
    is_favorite INTEGER NOT NULL DEFAULT 0,
    idempotency_key TEXT,
    idempotency_digest TEXT,
    CHECK ((status = 'completed') = (result IS NOT NULL)),
    CHECK ((status = 'failed') = (error IS NOT NULL))
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, number);
CREATE INDEX IF NOT EXISTS jobs_deleted ON jobs (id) WHERE is_deleted = 1;
CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE TABLE IF NOT EXISTS counters (seq INTEGER NOT NULL, fence INTEGER NOT NULL);
INSERT INTO counters SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM counters);
"""
# Columns of later numbers than the first. Upgrade 1 -> 2: jobs may be favourites.
_ADDED_COLUMNS = {"is_favorite": "INTEGER NOT NULL DEFAULT 0"}


class Database:
    """A connection that threads share, one transaction at a time.

    Args:
        path: of the file; made where it is missing, or damaged and set aside.
        read_row: reads a row of the table; raises ValueError, TypeError or LookupError for one that is damaged.

    Raises:
        StorageError: the file cannot be opened, or a newer kadr wrote it. It is left as it is.

    Attributes:
        is_new: the table is empty because there was no file, or only a damaged one. It stays so, also for the next
            process, until `mark_complete` is called: what a lost database had is found beside it.
    """

    def __init__(self, path: Path, read_row: Callable[[sqlite3.Row], object] = lambda row: None) -> None:
        self.path, self._lock = path, RLock()
        with _explain_errors(path):
            _refuse_newer(path, _number_in_header(path))
            if path.exists() and (reason := _find_damage(path, read_row)) is not None:
                _set_aside(path, reason)
            self._connection = _connect(path)
            self.is_new = self._connection.execute("PRAGMA user_version").fetchone()[0] == 0
            if self.is_new:
                self._connection.executescript(f"BEGIN;{_CREATE}COMMIT;")

    def mark_complete(self, connection: sqlite3.Connection) -> None:
        """Ends `is_new`, within a transaction that inserts what a lost database had."""
        connection.execute(f"PRAGMA user_version = {JOBS_DATABASE_NUMBER}")
        self.is_new = False

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Runs the block as one transaction that writes: all of it is on disk when the block ends, or nothing.

        Raises:
            StorageError: the disk is full, or the file cannot be written.
        """
        with self._lock, _explain_errors(self.path):
            self.restore_if_deleted()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it already
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, values: Any = ()) -> list[sqlite3.Row]:
        """Returns the rows of a query that only reads.

        Raises:
            StorageError: the file cannot be read.
        """
        with self._lock, _explain_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    def restore_if_deleted(self) -> None:
        """Writes the database anew where somebody deleted its file, from what this connection still reads.

        Raises:
            StorageError: it cannot be written.
        """
        with self._lock, _explain_errors(self.path):
            if self.path.exists():
                return
            restored = self.path.with_suffix(".restored")
            restored.unlink(missing_ok=True)
            with closing(sqlite3.connect(restored)) as target:
                self._connection.backup(target)
            self._connection.close()  # first: it removes its journal, by name
            replace_file(restored, self.path)
            self._connection = _connect(self.path)
        warnings.warn(KadrWarning(f"somebody deleted {self.path}; it was written again, with all jobs."), stacklevel=2)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.create_function("has_words", 2, _has_words, deterministic=True)  # SQLite's own LIKE is for ASCII
    connection.execute("PRAGMA synchronous = FULL")  # an accepted job survives a power cut
    connection.execute(f"PRAGMA journal_mode = {'WAL' if _is_wal_safe(sqlite3.sqlite_version_info) else 'TRUNCATE'}")
    return connection


def _is_wal_safe(version: tuple[int, ...]) -> bool:
    """Tells whether this version of SQLite has the fix of WAL's reset race."""
    major, minor, patch = version[:3]
    fixed_patch = _WAL_FIXED_PATCH.get((major, minor))
    return (major, minor, patch) >= _WAL_FIXED_IN or (fixed_patch is not None and patch >= fixed_patch)


def _number_in_header(path: Path) -> int:
    """Returns the schema number in a file that SQLite has not opened: opening one may change it. 0 for other files."""
    try:
        with open_regular(path) as file:
            header = file.read(_NUMBER_BYTES.stop)
    except FileNotFoundError:
        return 0
    return int.from_bytes(header[_NUMBER_BYTES], "big") if header.startswith(_MAGIC) else 0


def _has_words(text: bytes, words: str) -> bool:
    """Tells whether a text has all words, which are folded, with spaces between them.

    Args:
        text: as bytes, which are not UTF-8 where SQLite took them from JSON with half a character.
    """
    folded = text.decode(errors="replace").casefold()
    return all(word in folded for word in words.split())


def _refuse_newer(path: Path, number: int) -> None:
    if number > JOBS_DATABASE_NUMBER:
        raise StorageError(
            f"the queue in {path} has the schema number {number}; kadr {__version__} reads numbers up to "
            f"{JOBS_DATABASE_NUMBER}. A newer kadr wrote it: update kadr, or choose another folder."
        )


def _upgrade(connection: sqlite3.Connection, number: int) -> None:
    """Adds what an older kadr did not store to a database of an earlier number; 0: of one that it had not finished."""
    columns = {row["name"] for row in connection.execute("PRAGMA table_info(jobs)")}
    if columns and (missing := _ADDED_COLUMNS.keys() - columns):
        connection.execute("BEGIN IMMEDIATE")
        for name in sorted(missing):
            connection.execute(f"ALTER TABLE jobs ADD COLUMN {name} {_ADDED_COLUMNS[name]}")
        connection.execute(f"PRAGMA user_version = {JOBS_DATABASE_NUMBER if number else 0}")
        connection.execute("COMMIT")


def _find_damage(path: Path, read_row: Callable[[sqlite3.Row], object]) -> str | None:
    """Returns what is wrong with a database file, or None. One of an earlier number is upgraded.

    Raises:
        StorageError: a newer kadr wrote it, and had not finished when it ended.
        sqlite3.Error: the system does not let it be read, which says nothing of the file.
    """
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            ((verdict, *_),) = connection.execute("PRAGMA integrity_check(1)").fetchall()
            if verdict != "ok":
                return str(verdict)
            (number,) = connection.execute("PRAGMA user_version").fetchone()
            _refuse_newer(path, number)
            _upgrade(connection, number)
            if number:
                for row in connection.execute("SELECT * FROM jobs"):
                    read_row(row)
            return None
    except (ValueError, TypeError, LookupError) as error:
        return f"a row of it: {error}"
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        return str(error)


def _is_damage(error: sqlite3.Error) -> bool:
    """Tells whether the contents of a file are at fault, rather than the system that does not let it be used."""
    return any(words in str(error) for words in _DAMAGE)


def _set_aside(path: Path, reason: str) -> None:
    """Renames a damaged database, with its journal, to a name that is free."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    for ending in ("-journal", "-wal", "-shm"):  # first: a new database would be damaged by an old journal
        if (journal := path.with_name(path.name + ending)).exists():
            replace_file(journal, aside.with_name(aside.name + ending))
    replace_file(path, aside)
    warnings.warn(
        KadrWarning(
            f"the queue in {path} is damaged ({reason}). It is kept as {aside.name}; a new one begins, with the "
            "finished videos that are found beside it."
        ),
        stacklevel=2,
    )


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a bug, or what a caller handles
    except (sqlite3.Error, OSError) as error:
        is_damage = isinstance(error, sqlite3.Error) and _is_damage(error)
        way_out = (
            "Start again: it is then set aside, and the videos beside it are found."
            if is_damage
            else "Check the disk's free space and the file's permissions."
        )
        raise StorageError(f"the queue in {path} cannot be used: {error}. {way_out}") from error
