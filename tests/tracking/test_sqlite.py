"""The local store's file is made whole or not at all, and one that cannot be used is named."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from kd_lightning.tracking.sqlite import check_database, create_database
from tests.shortcuts import MIGRATE


def test_a_whole_database_and_none_at_all_are_fine(store: Path, tmp_path: Path) -> None:
    before = store.read_bytes()
    check_database(store)
    check_database(tmp_path / "none.db")
    assert store.read_bytes() == before
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_torn_database_is_named(store: Path, kept: float) -> None:
    content = store.read_bytes()
    store.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(
        OSError, match=r"the tracking store .*mlflow\.db is damaged \(.*\), expected a SQLite database: put"
    ):
        check_database(store)


def test_pages_that_were_overwritten_are_named(store: Path) -> None:
    content = bytearray(store.read_bytes())
    content[4096 * 20 : 4096 * 24] = b"x" * 4096 * 4
    store.write_bytes(content)
    with pytest.raises(OSError, match="is damaged") as error:
        check_database(store)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("something else " * 100)
    with pytest.raises(OSError, match=r"is damaged \(file is not a database\)"):
        check_database(tmp_path / "mlflow.db")


def test_a_lock_is_waited_for_and_one_that_stays_is_named(store: Path) -> None:
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"locked by another process.*for 3 s: end that process"):
            check_database(store)
        assert time.monotonic() - begun < 5
        other.execute("ROLLBACK")
    check_database(store)


def test_what_a_killed_creation_left_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MIGRATE, "1")
    (tmp_path / ".mlflow.db.tmp").write_bytes(b"half a database")
    (tmp_path / ".mlflow.db.tmp-journal").write_bytes(b"of that")
    (tmp_path / ".mlflow.db.lock").touch()
    create_database(tmp_path / "mlflow.db")
    check_database(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_one_that_is_there_is_left_as_it_is(store: Path) -> None:
    before = store.stat().st_mtime_ns
    create_database(store)
    assert store.stat().st_mtime_ns == before
