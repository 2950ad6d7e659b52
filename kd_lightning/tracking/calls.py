"""A call of a tracking store: bounded in time, and what is said of its failure."""

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

REQUEST_SECONDS = 30
"""After which a request that is not answered has failed."""

_T = TypeVar("_T")
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_lock = threading.Lock()
_in_use: Counter[str] = Counter()
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
_ATTEMPTS_FOR_WHAT_IS_UNKNOWN = 3


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Make a call in a thread of its own, and wait for it: signals are served meanwhile, whatever the call does.

    Raises:
        TimeoutError: When the call has not ended after ``seconds``; it is left to itself.
    """
    results: list[_T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="kd-lightning ask", daemon=True).start()
    if not done.wait(seconds):
        raise TimeoutError(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def bounded_requests(upload: bool = False) -> Iterator[None]:
    """Let MLflow's requests fail soon, and without retries of MLflow's own (7, over minutes).

    MLflow has settings of the environment for this, and no arguments: they are set while the call lasts, and a setting
    that the user made stays. An upload keeps MLflow's 120 s, as a server may answer only once it has stored the file.
    """
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    if not upload:
        settings[_TIMEOUT] = str(REQUEST_SECONDS)
    with _lock:
        ours = [name for name in settings if _in_use[name] or name not in os.environ]
        for name in ours:
            _in_use[name] += 1
            os.environ[name] = settings[name]
    try:
        yield
    finally:
        with _lock:
            for name in ours:
                _in_use[name] -= 1
                if not _in_use[name]:
                    os.environ.pop(name, None)


def seconds_set_by_user(otherwise: float) -> float:
    """Return how long the user lets a request take, by MLflow's setting."""
    with _lock:
        return float(otherwise if _in_use[_TIMEOUT] else os.environ.get(_TIMEOUT) or otherwise)


class StoreAwayError(ConnectionError):
    """A store cannot be used now, and may be back by itself.

    Attributes:
        what: What was found, without the remedy.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}{remedy}")
        self.what = what


def is_refusal(error: BaseException, attempts: int) -> bool:
    """Tell whether a store would give this answer again, so that the call is not repeated."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    if isinstance(error, HTTPError) and error.response is not None:
        return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 429)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return False
    return attempts >= _ATTEMPTS_FOR_WHAT_IS_UNKNOWN


def reason(error: BaseException) -> str:
    """Say in a few words why a call failed, without SQL, stack or credentials."""
    from requests import exceptions

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, exceptions.Timeout):
            return "no answer"
        if isinstance(cause, exceptions.RetryError):
            status = re.search(r"too many (\d+) error responses", str(cause))
            return f"it answers with error {status[1]}" if status else "it answers with errors"
        if isinstance(cause, exceptions.ConnectionError):
            return next((say for sign, say in _SIGNS.items() if sign in str(cause)), "no connection")
        if getattr(cause, "orig", None) is not None:  # SQLAlchemy's: what the database itself said
            return without_credentials(str(cause.orig)).strip().splitlines()[0]  # type: ignore[attr-defined]
        cause = cause.__cause__ or cause.__context__
    lines = without_credentials(str(error)).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\([\w.]+\) ", "", lines[0])


def without_credentials(text: str) -> str:
    """Hide the user, password or token of any address in a text."""
    text = re.sub(r"://[^/\s@]*@", "://***@", text)
    return re.sub(r"(?i)\b(password|token|secret|key)=[^&\s]+", r"\1=***", text)


_SIGNS = {
    "timed out": "no answer",
    "refused": "connection refused",
    "resolve": "its name is not known",
    "resolution": "its name is not known",
    "reset": "connection lost",
    "aborted": "connection lost",
    "closed": "connection lost",
}
