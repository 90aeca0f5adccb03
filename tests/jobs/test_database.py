"""The database survives what happens to its file, and is never overwritten where somebody may still want it."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from kadr.errors import KadrWarning
from kadr.jobs import database as database_module
from kadr.jobs.database import Database, _is_wal_safe
from kadr.jobs.job import StorageError
from kadr.schema import JOBS_DATABASE_NUMBER

INSERT = (
    "INSERT INTO jobs (id, owner, status, priority, position, engine, request, labels, created_at, seq) "
    "VALUES (?, '', 'queued', 0, 1.0, '{}', '{}', '{}', 0.0, 1)"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with two rows, complete and closed."""
    path = tmp_path / "jobs.sqlite"
    database = Database(path)
    with database.transaction() as connection:
        database.mark_complete(connection)
        connection.execute(INSERT, ("a",))
        connection.execute(INSERT, ("b",))
    database.close()
    return path


def ids(database: Database) -> list[str]:
    """Returns the ids of all rows, and closes the database."""
    with closing(database):
        return [row["id"] for row in database.rows("SELECT id FROM jobs ORDER BY id")]


def test_transaction_that_fails_changes_nothing(path: Path) -> None:
    with closing(Database(path)) as database:

        def delete_and_fail() -> None:
            with database.transaction() as connection:
                connection.execute("DELETE FROM jobs")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            delete_and_fail()
        assert len(database.rows("SELECT * FROM jobs")) == 2


def test_database_is_new_until_it_is_marked_complete(tmp_path: Path) -> None:
    for _ in range(2):  # a process that died before it was complete
        database = Database(tmp_path / "jobs.sqlite")
        assert database.is_new
        database.close()
    database = Database(tmp_path / "jobs.sqlite")
    with database.transaction() as connection:
        database.mark_complete(connection)
    assert not database.is_new
    database.close()
    assert not Database(tmp_path / "jobs.sqlite").is_new


def test_mark_of_a_transaction_that_failed_is_not_there(tmp_path: Path) -> None:
    database = Database(tmp_path / "jobs.sqlite")

    def mark_and_fail() -> None:
        with database.transaction() as connection:
            database.mark_complete(connection)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        mark_and_fail()
    database.close()
    assert Database(tmp_path / "jobs.sqlite").is_new


def test_empty_file_is_a_new_database(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").touch()
    assert Database(tmp_path / "jobs.sqlite").is_new


@pytest.mark.parametrize("offset", [0, 100, 4096, 8192])
def test_overwritten_bytes_are_set_aside(path: Path, offset: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[offset : offset + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    with pytest.warns(KadrWarning, match=r"is damaged \(.*It is kept as jobs.damaged-1.sqlite"):
        database = Database(path)
    assert database.is_new
    assert ids(database) == []
    assert path.with_name("jobs.damaged-1.sqlite").read_bytes() == damaged


def test_each_damaged_file_is_kept(path: Path) -> None:
    for number in (1, 2):
        path.write_bytes(b"not a database, " * 512)
        with pytest.warns(KadrWarning, match=f"kept as jobs.damaged-{number}.sqlite"):
            Database(path).close()
    assert path.with_name("jobs.damaged-2.sqlite").read_bytes() == b"not a database, " * 512


def test_journal_of_a_damaged_file_is_set_aside_with_it(path: Path) -> None:
    path.with_name("jobs.sqlite-wal").write_bytes(b"frames")
    with pytest.warns(KadrWarning, match="is damaged"):
        database_module._set_aside(path, "malformed")
    assert path.with_name("jobs.damaged-1.sqlite-wal").read_bytes() == b"frames"
    assert [file.name for file in path.parent.glob("jobs.sqlite-wal")] == []


def test_row_that_cannot_be_read_is_damage(path: Path) -> None:
    def read_row(row: sqlite3.Row) -> None:
        if row["id"] == "b":
            raise ValueError("b is bad")

    with pytest.warns(KadrWarning, match=r"damaged \(a row of it: b is bad\)"):
        assert Database(path, read_row).is_new


@pytest.mark.parametrize(
    "statement",
    ["UPDATE jobs SET owner = CAST(x'ff' AS TEXT)", "DROP TABLE jobs", "ALTER TABLE jobs RENAME COLUMN seq TO other"],
)
def test_database_that_is_not_as_kadr_made_it_is_damage(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()

    def read_row(row: sqlite3.Row) -> None:
        row["seq"]

    with pytest.warns(KadrWarning, match="is damaged"):
        assert Database(path, read_row).is_new


def test_newer_database_is_refused_and_left_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA user_version = {JOBS_DATABASE_NUMBER + 1}")
        connection.commit()
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(StorageError, match=r"schema number .* A newer kadr wrote it: update kadr"):
        Database(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_newer_number_that_is_only_in_the_log_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {JOBS_DATABASE_NUMBER + 1}")
        connection.commit()
    monkeypatch.setattr(database_module, "_number_in_header", lambda path: 0)
    with pytest.raises(StorageError, match="A newer kadr wrote it"):
        Database(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no open file")
def test_deleted_file_is_written_again_with_all_rows(path: Path) -> None:
    database = Database(path)
    path.unlink()
    with pytest.warns(KadrWarning, match="somebody deleted .*; it was written again"), database.transaction() as change:
        change.execute(INSERT, ("c",))
    database.restore_if_deleted()  # it is there
    database.close()
    assert ids(Database(path)) == ["a", "b", "c"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no open file")
def test_deleted_file_is_written_again_in_a_wal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_is_wal_safe", lambda version: True)  # one connection at a time is safe
    database = Database(path)
    with database.transaction() as connection:
        connection.execute(INSERT, ("c",))
    path.unlink()
    with pytest.warns(KadrWarning, match="it was written again"):
        database.restore_if_deleted()
    with database.transaction() as connection:
        connection.execute(INSERT, ("d",))
    database.close()
    assert ids(Database(path)) == ["a", "b", "c", "d"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no open file")
def test_file_that_another_one_replaced_is_not_written(path: Path) -> None:
    database = Database(path)
    path.unlink()
    path.write_bytes(b"a backup that somebody put here")
    with pytest.raises(StorageError), database.transaction() as connection:
        connection.execute(INSERT, ("c",))
    database.close()
    assert path.read_bytes() == b"a backup that somebody put here"


def test_folder_in_the_place_of_the_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").mkdir()
    with pytest.raises(StorageError, match=r"the queue in .* cannot be used: "):
        Database(tmp_path / "jobs.sqlite")
    assert (tmp_path / "jobs.sqlite").is_dir()


def test_file_that_another_program_locks_is_not_taken_for_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="database is locked"):
            Database(path)
        other.execute("ROLLBACK")
    assert ids(Database(path)) == ["a", "b"]


def test_damage_while_it_is_open_says_to_start_again(path: Path) -> None:
    with closing(Database(path)) as database:
        path.write_bytes(b"\0" * path.stat().st_size)
        with pytest.raises(StorageError, match="Start again: it is then set aside"):
            database.rows("SELECT * FROM jobs")


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 9), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), True),
        ((4, 0, 0), True),
    ],
)
def test_wal_is_used_only_where_its_race_is_fixed(version: tuple[int, int, int], is_safe: bool) -> None:
    assert _is_wal_safe(version) is is_safe


def test_commits_wait_for_the_disk(path: Path) -> None:
    with closing(Database(path)) as database:
        ((synchronous,),) = database.rows("PRAGMA synchronous")
        ((journal,),) = database.rows("PRAGMA journal_mode")
    assert synchronous == 2  # FULL
    assert journal in ("wal", "truncate")


@pytest.mark.parametrize("number", [0, 1])
def test_database_of_an_older_kadr_gets_what_it_lacks(path: Path, number: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN is_favorite")
        connection.execute(f"PRAGMA user_version = {number}")
        connection.commit()
    with closing(Database(path, lambda row: row["is_favorite"])) as database:
        assert [tuple(row) for row in database.rows("SELECT id, is_favorite FROM jobs")] == [("a", 0), ("b", 0)]
        assert database.is_new == (number == 0)
        expected = JOBS_DATABASE_NUMBER if number else 0
        assert [tuple(row) for row in database.rows("PRAGMA user_version")] == [(expected,)]
