"""A store is fed from journals in the background, until it has them all or the process ends."""

import atexit
import logging
import math
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from kd_lightning.tracking.calls import REQUEST_SECONDS, reason, without_credentials
from kd_lightning.tracking.journal import JOURNAL, Journal, close_if_dead, last_begin
from kd_lightning.tracking.shipping import Shipment, is_shipped
from kd_lightning.tracking.store import store_name

PATIENCE = 10.0
"""Seconds that the end waits for a store that has stopped to answer."""
_LONGEST_PAUSE = 5.0
_LOOK_SECONDS = 1.0
_SHARE = 0.025
"""Of a processor, for what is shipped while a training runs: Python's threads take turns."""
_MOST_BYTES = 4_000_000
"""Wait in a journal at most before it takes more than that; the end ships so much in some ten seconds."""
_THREAD = "kd-lightning shipper"
_log = logging.getLogger(__name__)


class Shipper:
    """The thread that ships the journals of this process to one store.

    No method but :meth:`flush` waits. What the store cannot take now is tried again, with pauses of up to 5 s, for as
    long as the process lives; what it refuses, such as a name that it does not take, is said and left out. What is not
    shipped when the process ends stays in the journals.
    """

    def __init__(self, uri: str) -> None:
        self._store = without_credentials(uri)
        self._uri = uri
        self._client: Any = None
        self._changed = threading.Condition()
        self._shipments: dict[Path, Shipment] = {}
        self._journals: dict[Path, Journal] = {}
        self._left: list[Path] = []
        self._thread: threading.Thread | None = None
        self._trouble: str | None = None
        self._pauses = 0
        self._last_success = 0.0
        self._flushing = 0
        self._now = self._given_up = self._has_lost = False

    def add(self, journal: Journal | Path) -> Shipment:
        """Ship a journal, from now on."""
        folder = journal if isinstance(journal, Path) else journal.folder
        folder = folder.absolute()
        with self._changed:
            if not isinstance(journal, Path):
                self._journals[folder] = journal
            if folder not in self._shipments:
                self._shipments[folder] = Shipment(folder, self._uri)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name=_THREAD, daemon=True)
                self._thread.start()
                _hide_what_mlflow_prints_of_it()
                atexit.register(self._end)
            self._changed.notify_all()
            return self._shipments[folder]

    def adopt(self, root: Path) -> None:
        """Close the runs of processes that were killed, and ship what they have left for this store.

        Args:
            root: Folder of folders with journals.
        """
        with self._changed:
            self._left.append(root)
            self._changed.notify_all()

    def is_away(self, what: str) -> None:
        """Say that the store is away at the start; it is tried again."""
        with self._changed:
            first_time, self._trouble = self._trouble is None, "away since the start"
        if first_time:
            _log.warning("%s: the training goes on, what it logs is kept in its journals and shipped later", what)

    def flush(self, patience: float = PATIENCE, request: float = REQUEST_SECONDS) -> bool:
        """Wait until all is shipped, as long as something is.

        Args:
            patience: Seconds in which nothing could be shipped, after which it gives up.
            request: As long as nothing has failed: seconds that one call may take. An upload has MLflow's 120 s.

        Returns:
            Whether the store has all.
        """
        begun = time.monotonic()
        written = sum(not journal.sync() for journal in list(self._journals.values())) == 0
        with self._changed:
            self._flushing += 1
            self._now = True
            self._changed.notify_all()
            try:
                while self._next() is not None or self._left:
                    allowed = max(patience, request)
                    if self._trouble is not None:
                        allowed = patience
                    elif any(shipment.uploads for shipment in self._shipments.values()) and request == REQUEST_SECONDS:
                        allowed = math.inf
                    if time.monotonic() - max(begun, self._last_success) > allowed:
                        self._given_up = patience > 0
                        break
                    self._changed.wait(0.1)
                return written and self._next() is None and not self._refused()
            finally:
                self._flushing -= 1

    def undelivered(self) -> str | None:
        """Say what the store does not have, None where it has all."""
        counts = [shipment.counts() for shipment in list(self._shipments.values())]
        values, others = (sum(count) for count in zip(*counts, strict=True)) if counts else (0, 0)
        if not values + others:
            return None
        said = [f"{values:,} metric values"] if values else []
        said += [f"{others:,} other entries (runs, parameters, tags, files)"] if others else []
        why = self._trouble or next(iter(self._refused()), None)
        return f"{' and '.join(said)} were not delivered to {self._store}" + (f" ({why})" if why else "")

    def _refused(self) -> list[str]:
        return [shipment.refused for shipment in self._shipments.values() if shipment.refused]

    def _next(self) -> Shipment | None:
        """Return the first of the journals of which something is not shipped."""
        return next((shipment for shipment in self._shipments.values() if shipment.waiting()), None)

    def _make_client(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri)
        return self._client

    def _work(self) -> None:
        while True:
            with self._changed:
                shipment = self._next()
                if shipment is None and not self._left:
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: (self._flushing and self._next()) or self._left, _LOOK_SECONDS)
                    continue
            if shipment is None:
                self._look_for_what_is_left()
                continue
            used = time.thread_time()
            try:
                lost = shipment.advance(self._make_client)
            except BaseException as error:  # whatever it is, it is the store's: the training goes on
                self._failed(shipment, error)
            else:
                self._delivered(lost)
                pause = (time.thread_time() - used) / _SHARE
                with self._changed:
                    busy = lambda: self._flushing or shipment.waiting() > _MOST_BYTES  # noqa: B023, E731
                    self._changed.wait_for(busy, pause)

    def _delivered(self, lost: str | None) -> None:
        with self._changed:
            self._last_success, self._given_up, self._pauses = time.monotonic(), False, 0
            trouble, self._trouble = self._trouble, None
            first_lost, self._has_lost = lost and not self._has_lost, self._has_lost or bool(lost)
            self._changed.notify_all()
        if trouble is not None:
            _log.warning("%s answers again: what waited is being delivered", self._store)
        if first_lost:
            _log.warning("%s did not take something that was logged: %s", self._store, lost)

    def _failed(self, shipment: Shipment, error: BaseException) -> None:
        if shipment.refused:
            _log.warning("%s does not take %s: %s", self._store, shipment.folder / JOURNAL, shipment.refused)
            return
        with self._changed:
            first_time, self._trouble = self._trouble is None, reason(error)
            self._pauses += 1
            self._changed.notify_all()
        if first_time:
            _log.warning(
                "%s does not take what is logged (%s); the training goes on, and it is tried again",
                self._store,
                self._trouble,
            )
        with self._changed:
            self._now = False
            self._changed.wait_for(lambda: self._now, min(_LONGEST_PAUSE, 0.25 * 2 ** min(self._pauses, 10)))

    def _look_for_what_is_left(self) -> None:
        root = self._left[0]
        for folder in journals_below(root):
            try:
                begin = last_begin(folder) if folder not in self._shipments else None
                if begin is None or (begin["store"], begin["of"]) != (store_name(self._uri, folder), folder.name):
                    continue
                if not close_if_dead(folder) and not is_shipped(folder):
                    self.add(folder)
            except OSError as error:
                _log.warning("%s cannot be read: %s", folder / JOURNAL, error)
        with self._changed:
            self._left.remove(root)
            self._changed.notify_all()

    def _end(self) -> None:
        """At the end of the process: a last attempt for what nobody waited for."""
        if self._trouble is None and not self._given_up:
            self.flush()


def journals_below(root: Path) -> list[Path]:
    """Return the folders with journals, parents ahead of their children, which name them in the store."""
    folders = [file.parent.absolute() for file in sorted(root.glob(f"**/{JOURNAL}"))]
    begins = {folder: last_begin(folder) or {} for folder in folders}
    parents = {begin.get("key"): begin.get("parent") for begin in begins.values()}

    def depth(folder: Path) -> int:
        above, key = [], begins[folder].get("parent")
        while key is not None and key not in above:
            above.append(key)
            key = parents.get(key)
        return len(above)

    return sorted(folders, key=depth)


@cache
def shipper_to(uri: str) -> Shipper:
    """Return the shipper of a store: one for each address."""
    return Shipper(uri)


@cache
def _hide_what_mlflow_prints_of_it() -> None:
    """Leave out what MLflow's loggers say in the thread of a shipper, stacks and SQL: it is said in a line here."""
    for name in ("mlflow.store.db.utils", "mlflow.utils.rest_utils", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(lambda record: record.threadName != _THREAD)
