"""Whether a store takes runs, asked before anything is trained, and how its errors are said."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from kd_lightning.tracking.calls import bounded_requests, reason, within, without_credentials
from kd_lightning.tracking.sqlite import check_database, sqlite_file

_ASK_SECONDS = 4.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_store(uri: str) -> None:
    """Ask a server for an answer, and a SQLite file whether it is whole and free; make nothing.

    Raises:
        OSError: With what was found and what to do, within 5 s (``MLFLOW_HTTP_REQUEST_TIMEOUT`` if it is set).
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
        seconds = float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") or _ASK_SECONDS)
        with one_line_errors(uri):
            client = plain_client(uri)
            within(seconds, lambda: client.search_experiments(max_results=1))


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


def _unusable(uri: str, why: str) -> OSError:
    return ConnectionError(
        f"the tracking store {without_credentials(uri)} cannot be used ({why}), expected an MLflow server or a "
        "database that takes runs: start it, or set logger.tracking_uri or MLFLOW_TRACKING_URI to another; logger=null "
        "logs nothing"
    )
