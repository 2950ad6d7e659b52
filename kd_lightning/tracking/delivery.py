"""What is logged waits here, and goes to the store in the background, in order, until the store has it."""

import atexit
import logging
import math
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kd_lightning.tracking.calls import REQUEST_SECONDS, bounded_requests, is_refusal, reason, without_credentials

PATIENCE = 10.0
"""Seconds that the end waits for a store that has stopped to answer."""
_MOST_VALUES = 200_000
_VALUES_PER_REQUEST = 1000
_LONGEST_PAUSE = 5.0
_THREAD = "kd-lightning delivery"
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    """One call to be made; metrics are apart, so that those that follow each other go in one request."""

    run_id: str
    send: Callable[[str], object] | None = None
    metrics: list[Any] = field(default_factory=list)
    is_upload: bool = False
    copy: Path | None = None
    attempts: int = 0
    begins_run: bool = False


class Delivery:
    """The queue of one store, and the thread that empties it.

    No method but :meth:`flush` waits. What the store cannot take now is tried again, with pauses of up to 5 s, for as
    long as the process lives; what it refuses, such as a name that it does not take, is said and left out. Metrics keep
    the step and the time at which they were logged. A store keeps an exact duplicate of a metric once, so that one that
    is sent again after an answer was lost does no harm.

    A run that the store has not made yet goes by a name of its own until then, see :meth:`begin_run`.
    """

    def __init__(self, uri: str) -> None:
        self._store = without_credentials(uri)
        self._client: Any = None
        self._uri = uri
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._values = 0
        self._lost_values = self._lost_others = 0
        self._ids: dict[str, str | None] = {}
        self._thread: threading.Thread | None = None
        self._trouble: str | None = None
        self._last_success = 0.0
        self._hurry = False
        self._given_up = False
        self._files: Path | None = None

    def begin_run(self, name: str, make: Callable[[Any, str, bool], str]) -> None:
        """Have a run made, or found, in its turn.

        Args:
            name: By which it goes until its id is known.
            make: Given MLflow's client, that name, and whether this is a further attempt, as one whose answer was lost
                may have made it; returns the id.
        """
        self._ids[name] = None
        entry = _Entry(name, begins_run=True)

        def send(_: str) -> None:
            self._ids[name] = make(self.client, name, entry.attempts > 0)

        entry.send = send
        self._add(entry)

    def id_of(self, run_id: str) -> str:
        """Return the store's id of a run; the name that it goes by as long as there is none."""
        return self._ids.get(run_id) or run_id

    def call(self, run_id: str, send: Callable[[Any, str], object]) -> None:
        """Have a call made: ``send(client, run_id)``."""
        self._add(_Entry(run_id, lambda known: send(self.client, known)))

    def metrics(self, run_id: str, metrics: Iterable[Any]) -> None:
        """Have metrics logged: MLflow's entities, with step and timestamp."""
        self._add(_Entry(run_id, metrics=list(metrics)))

    def file(
        self, run_id: str, path: Path, folder: str | None = None, *, contents: bool = False, copy: bool = True
    ) -> None:
        """Have a file or a directory kept as an artifact.

        Args:
            run_id: Whose.
            path: Copied now, as it may have changed or gone when its turn comes.
            folder: In the run's artifacts.
            contents: What is in the directory, without the directory itself.
            copy: False for a path that stays as it is.
        """
        path = self._copy(path) if copy else path

        def send(known: str) -> None:
            log = self.client.log_artifacts if contents else self.client.log_artifact
            log(known, str(path), folder)

        self._add(_Entry(run_id, send, is_upload=True, copy=path.parent if copy else None))

    def flush(self, patience: float = PATIENCE, request: float = REQUEST_SECONDS) -> bool:
        """Wait until all is delivered, as long as something is.

        Args:
            patience: Seconds in which nothing could be delivered, after which it gives up.
            request: As long as nothing has failed: seconds that one call may take. An upload has MLflow's 120 s.

        Returns:
            Whether all is delivered.
        """
        begun = time.monotonic()
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while self._queue:
                allowed = max(patience, request)
                if self._trouble is not None:
                    allowed = patience
                elif self._queue[0].is_upload and request == REQUEST_SECONDS:
                    allowed = math.inf
                if time.monotonic() - max(begun, self._last_success) > allowed:
                    self._given_up = patience > 0
                    break
                self._changed.wait(0.1)
            return not self._queue

    def undelivered(self) -> str | None:
        """Say what the store does not have, None where it has all."""
        with self._changed:
            values = self._lost_values + sum(len(entry.metrics) for entry in self._queue)
            others = self._lost_others + sum(not entry.metrics for entry in self._queue)
        if not values + others:
            return None
        counts = [f"{values:,} metric values"] if values else []
        counts += [f"{others:,} other entries (runs, parameters, tags, files)"] if others else []
        return f"{' and '.join(counts)} were not delivered to {self._store}" + (
            f" ({self._trouble})" if self._trouble else ""
        )

    @property
    def client(self) -> Any:
        """MLflow's own client, of this thread."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri)
        return self._client

    def _add(self, entry: _Entry) -> None:
        with self._changed:
            if self._values + len(entry.metrics) > _MOST_VALUES:
                self._lose(entry, f"more than {_MOST_VALUES:,} values wait, further ones are left out")
                return
            self._values += len(entry.metrics)
            self._queue.append(entry)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name=_THREAD, daemon=True)
                self._thread.start()
                _hide_what_mlflow_prints_of_it()
                atexit.register(self._end)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                entries = self._next()
            try:
                with bounded_requests(upload=entries[0].is_upload):
                    self._send(entries)
            except BaseException as error:  # whatever it is, it is the store's: the training goes on
                self._failed(entries, error)
            else:
                self._delivered(entries)

    def _next(self) -> list[_Entry]:
        """Return the first entry, with the metrics of the same run that follow it; they stay in the queue."""
        first = self._queue[0]
        entries, values = [first], len(first.metrics)
        if first.metrics and not first.attempts:
            for entry in list(self._queue)[1:_VALUES_PER_REQUEST]:
                values += len(entry.metrics)
                if not entry.metrics or entry.run_id != first.run_id or values > _VALUES_PER_REQUEST:
                    break
                entries.append(entry)
        return entries

    def _send(self, entries: list[_Entry]) -> None:
        first = entries[0]
        if first.run_id in self._ids and self._ids[first.run_id] is None and not first.begins_run:
            raise _NoRunError("its run was refused")
        if first.metrics:
            metrics = [metric for entry in entries for metric in entry.metrics]
            self.client.log_batch(self.id_of(first.run_id), metrics=metrics, synchronous=True)
        else:
            assert first.send is not None
            first.send(self.id_of(first.run_id))

    def _delivered(self, entries: list[_Entry]) -> None:
        with self._changed:
            self._take(entries)
            self._last_success, self._given_up = time.monotonic(), False
            trouble, self._trouble = self._trouble, None
            self._changed.notify_all()
        if trouble is not None:
            _log.warning("%s answers again: what waited is being delivered", self._store)

    def _failed(self, entries: list[_Entry], error: BaseException) -> None:
        refused = isinstance(error, _NoRunError) or is_refusal(error, entries[0].attempts + 1)
        if refused and len(entries) > 1:  # one of them: each alone
            with self._changed:
                for entry in entries:
                    entry.attempts += 1
            return
        with self._changed:
            for entry in entries[:1]:
                entry.attempts += 1
            if refused:
                self._take(entries)
                self._lose(entries[0], reason(error))
                self._changed.notify_all()
                return
            first_time, self._trouble = self._trouble is None, reason(error)
            self._changed.notify_all()
            pause = min(_LONGEST_PAUSE, 0.25 * 2 ** min(entries[0].attempts, 10))
        if first_time:
            _log.warning(
                "%s does not take what is logged (%s); the training goes on, and it is tried again",
                self._store,
                self._trouble,
            )
        with self._changed:
            self._changed.wait_for(lambda: self._hurry, pause)
            self._hurry = False

    def _take(self, entries: list[_Entry]) -> None:
        for entry in entries:
            self._queue.popleft()
            self._values -= len(entry.metrics)
            if entry.copy is not None:
                shutil.rmtree(entry.copy, ignore_errors=True)

    def _lose(self, entry: _Entry, why: str) -> None:
        if not self._lost_values + self._lost_others:
            _log.warning("%s did not take something that was logged: %s", self._store, why)
        self._lost_values += len(entry.metrics)
        self._lost_others += not entry.metrics

    def _copy(self, path: Path) -> Path:
        if self._files is None:
            self._files = Path(tempfile.mkdtemp(prefix="kd-lightning-"))
        target = Path(tempfile.mkdtemp(dir=self._files)) / path.name
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy2(path, target)
        return target

    def _end(self) -> None:
        """At the end of the process: a last attempt for what nobody waited for."""
        if self._trouble is None and not self._given_up:
            self.flush()
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)


class _NoRunError(Exception):
    """What belongs to a run that the store did not make has nowhere to go."""


@cache
def delivery_to(uri: str) -> Delivery:
    """Return the queue of a store: one for each address."""
    return Delivery(uri)


@cache
def _hide_what_mlflow_prints_of_it() -> None:
    """Leave out what MLflow's loggers say in the thread of a delivery, stacks and SQL: it is said in a line here."""
    for name in ("mlflow.store.db.utils", "mlflow.utils.rest_utils", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(lambda record: record.threadName != _THREAD)
