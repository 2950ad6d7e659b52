"""The local store's file: made once and whole, and looked at before it is believed."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from filelock import FileLock, Timeout

from kd_lightning.tracking.calls import StoreAwayError

_CREATION_SECONDS = 300
_LOCKED_SECONDS = 3.0


def sqlite_file(uri: str) -> Path | None:
    """Return a SQLite store's file, None for any other address."""
    parts = urlsplit(uri)
    if not parts.scheme.startswith("sqlite") or parts.path.removeprefix("/") in ("", ":memory:"):
        return None
    return Path(parts.path.removeprefix("/"))


def create_database(file: Path) -> None:
    """Make MLflow's tables, under another name until they are whole; one process does, others wait.

    MLflow's own creation takes seconds, and two at once, or one that is killed, leave a database that none can open.

    Raises:
        OSError: When another process has not made it after minutes.
    """
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f".{file.name}.lock")
    try:
        with FileLock(lock, timeout=_CREATION_SECONDS):
            if not file.is_file():
                _create(file)
            lock.unlink(missing_ok=True)  # who waits for it finds the file
    except Timeout as error:
        raise OSError(
            f"{file.absolute()} is being made by another process since {_CREATION_SECONDS} s, expected some ten: end "
            f"that process, or remove {lock.absolute()}"
        ) from error


def _create(file: Path) -> None:
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = file.with_name(f".{file.name}.tmp")
    for leftover in (temporary, temporary.with_name(f"{temporary.name}-journal")):
        leftover.unlink(missing_ok=True)  # of a process that was killed: the lock is ours
    try:
        store: Any = SqlAlchemyStore(  # type: ignore[no-untyped-call]
            f"sqlite:///{temporary.absolute()}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
        )
        store.engine.dispose()
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def check_database(file: Path) -> None:
    """Open a SQLite file, read its structure, and take its lock once.

    Raises:
        StoreAwayError: For a file that another process keeps locked.
        OSError: For a file that is damaged, or that is no database.
    """
    if not file.is_file():
        return
    address = f"file:{quote(str(file.absolute()))}?mode=rw"
    end = time.monotonic() + _LOCKED_SECONDS
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=_LOCKED_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)
            problem = _first_problem(connection)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreAwayError(
                f"the tracking store {file.absolute()} is locked by another process, which did not let go of it for "
                f"{_LOCKED_SECONDS:g} s",
                ": end that process, or log elsewhere, logger.tracking_uri=sqlite:///other.db; without "
                "logger.required=true the training goes on without it",
            ) from error
        problem = str(error)
    except sqlite3.DatabaseError as error:
        problem = str(error)
    if problem is not None:
        raise OSError(
            f"the tracking store {file.absolute()} is damaged ({problem}), expected a SQLite database: put a copy "
            "of it back, or move it away (a new one is made; trained stages are kept); logger=null does without"
        )


def _first_problem(connection: sqlite3.Connection) -> str | None:
    try:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):  # too large to be read in the time
            return None
        raise
    return None if found == "ok" else str(found).replace("\n", " ")
