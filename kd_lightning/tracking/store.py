"""How a store is named, whether it takes runs, and how its errors are said."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from kd_lightning.tracking.calls import (
    StoreAwayError,
    bounded_requests,
    reason,
    seconds_set_by_user,
    within,
    without_credentials,
)
from kd_lightning.tracking.sqlite import check_database, sqlite_file

LOCAL_STORE = "sqlite:///mlruns/mlflow.db"
_ASK_SECONDS = 4.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def store_uri(tracking_uri: str | None = None) -> str:
    """Return where runs go: the argument, the environment's ``MLFLOW_TRACKING_URI``, or the local store."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or LOCAL_STORE


def store_name(uri: str, folder: Path) -> str:
    """Name a store in a journal: without credentials, and a SQLite file as seen from the journal's folder."""
    file = sqlite_file(uri)
    if file is not None:
        return f"sqlite:///{Path(os.path.relpath(file, folder)).as_posix()}"
    parts = urlsplit(uri)
    query = "&".join(
        part for part in parts.query.split("&") if not re.match(r"(?i)\w*(password|token|secret|key)=", part)
    )
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def named_store(name: str, folder: Path) -> str:
    """Return the address of a store that a journal names; with the credentials of the environment's, where it is that.

    Raises:
        ValueError: For a SQLite file whose folder is not on this machine.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given and store_name(given, folder) == name:
        return given
    file = sqlite_file(name)
    if file is None:
        return name
    file = Path(os.path.normpath(folder.absolute() / file))
    if not file.parent.is_dir():
        raise ValueError(f"expected a tracking store in {file.parent}, which is not there: pass --tracking-uri")
    return f"sqlite:///{file}"


def check_store(uri: str) -> None:
    """Ask a server for an answer, and a SQLite file whether it is whole and free; make nothing.

    Raises:
        StoreAwayError: For a store that is away, and may come back by itself: a server that does not answer, a SQLite
            file that another process keeps locked. Within 5 s (``MLFLOW_HTTP_REQUEST_TIMEOUT`` if it is set).
        OSError: For a SQLite file that is damaged, which only its owner can help.
    """
    file, parts = sqlite_file(uri), urlsplit(uri)
    port = _PORTS.get(parts.scheme.partition("+")[0])
    if file is not None:
        check_database(file)
    elif port is not None and parts.hostname:
        try:
            socket.create_connection((parts.hostname, parts.port or port), _ASK_SECONDS).close()
        except OSError as error:  # MLflow would try again for minutes
            raise _unusable(uri, str(error)) from error
    elif parts.scheme in ("http", "https"):
        with one_line_errors(uri):
            client = plain_client(uri)
            within(seconds_set_by_user(_ASK_SECONDS), lambda: client.search_experiments(max_results=1))


@contextmanager
def one_line_errors(uri: str) -> Iterator[None]:
    """Make one line of what MLflow, its database or its server raise, without SQL, stack or credentials.

    Raises:
        OSError: With the store, what it answered, and what to do.
    """
    try:
        with bounded_requests():
            yield
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise _unusable(uri, str(error)) from None
        raise
    except (ValueError, ImportError):
        raise
    except Exception as error:
        if "out-of-date database schema" in str(error):
            raise OSError(
                f"the tracking store {without_credentials(uri)} was written by another version of MLflow: copy it, "
                f"then run mlflow db upgrade {without_credentials(uri)}"
            ) from error
        # A traceback would print the cause, in which MLflow writes the address as it is.
        raise _unusable(uri, reason(error)) from (None if "@" in uri else error)


def plain_client(uri: str) -> Any:
    """Return MLflow's own client of a store."""
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _unusable(uri: str, why: str) -> StoreAwayError:
    return StoreAwayError(
        f"the tracking store {without_credentials(uri)} cannot be used ({why})",
        ", expected an MLflow server or a database that takes runs: start it, or set logger.tracking_uri or "
        "MLFLOW_TRACKING_URI to another; without logger.required=true the training goes on without it",
    )
