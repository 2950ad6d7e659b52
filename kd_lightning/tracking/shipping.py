"""One journal on its way to one store: how far it has come is noted beside it, so that any process can go on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from kd_lightning.durable_files import write_atomically
from kd_lightning.tracking.calls import REQUEST_SECONDS, bounded_requests, is_refusal, reason
from kd_lightning.tracking.journal import COPIES, JOURNAL, last_begin, read, remove_copy, whole_size
from kd_lightning.tracking.opening import open_run
from kd_lightning.tracking.operations import OPERATIONS, UPLOADS
from kd_lightning.tracking.sqlite import sqlite_file
from kd_lightning.tracking.store import store_name

_STATE, _LOCK = "shipped.json", ".shipped.lock"
_VALUES_PER_REQUEST = 1000
Line = tuple[int, dict[str, Any]]
"""Where the next line begins, and the operation."""


class Shipment:
    """Ships a journal, a request at a time: at least once, in order.

    Several processes may do so, as a run and ``kd-lightning-sync``: each takes a lock for a request, and goes on from
    where the last one has come to. A store keeps an exact duplicate of a metric once.

    Args:
        folder: The journal's.
        uri: The store's address, with credentials if it needs them.
    """

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self._uri = folder, uri
        self._store = store_name(uri, folder)
        self._lock = FileLock(folder / _LOCK, REQUEST_SECONDS, thread_local=False)
        self._attempts = self._one_by_one_until = 0
        self.offset = 0
        self.run_id: str | None = None
        """In the store, as soon as it is known."""
        self.experiment_id: str | None = None
        self.refused: str | None = None
        """Why the store does not take the run at all."""
        self.uploads = False
        """Whether the request under way is an upload."""
        self.lost_values = self.lost_others = 0
        self._load()

    def waiting(self) -> int:
        """Return how many bytes are not shipped, as far as this process knows."""
        try:
            if self.refused or os.stat(self.folder / JOURNAL).st_size <= self.offset:
                return 0
        except OSError:
            return 0
        return max(0, whole_size(self.folder) - self.offset)  # a torn line is nothing to wait for

    def advance(self, client: Callable[[], Any]) -> str | None:
        """Make the next request, if there is one.

        Args:
            client: Returns MLflow's.

        Returns:
            What the store refused, and is left out.

        Raises:
            Exception: Of MLflow's, for what may be tried again.
            ValueError: When the store refuses the run itself.
        """
        with self._lock:
            self._load()
            lines = self._next()
            if not lines:
                return None
            (end, operation), lost = lines[-1], None
            self.uploads = operation["op"] in UPLOADS
            try:
                with bounded_requests(upload=self.uploads):
                    again = self._send(client(), [operation for _, operation in lines])
            except BaseException as error:
                self._attempts += 1
                if not _is_refused(error, self._attempts):
                    raise
                if operation["op"] == "begin":
                    self.refused = reason(error)
                    raise
                if len(lines) > 1:  # one of them: each alone
                    self._one_by_one_until = end
                    return None
                lost, again = reason(error), False
                self._lose(operation)
            finally:
                self.uploads = False
            self._attempts = 0
            self._keep(0 if again else end)
            if operation["op"] == "artifact":
                remove_copy(self.folder, self.folder / operation["path"])
        return lost

    def counts(self) -> tuple[int, int]:
        """Return how many metric values, and how many other entries, the store does not have."""
        values, others = self.lost_values, self.lost_others
        for _, operation in read(self.folder, self.offset):
            if operation["op"] == "metrics":
                values += len(operation["values"])
            else:
                others += 1
        return values, others

    def _next(self) -> list[Line]:
        """Return the next operation, with the metrics that follow where it is one of these."""
        lines: list[Line] = []
        values = 0
        for line in read(self.folder, self.offset):
            values += len(line[1].get("values", ())) if _is_plain(line[1]) else 0
            if lines and not (_is_plain(line[1]) and values <= _VALUES_PER_REQUEST):
                break
            lines.append(line)
            if not _is_plain(line[1]) or self.offset < self._one_by_one_until:
                break
        return lines

    def _send(self, client: Any, operations: list[dict[str, Any]]) -> bool:
        """Make the request; tell whether all has to be shipped again from the start, as the run was gone."""
        name, operation = operations[0]["op"], operations[0]
        if name == "begin":
            return self._begin(client, operation)
        if self.run_id is None:
            raise ValueError(f"{self.folder / JOURNAL} does not say which run it is of")
        if name == "metrics":
            _log_metrics(client, self.run_id, operations)
        elif name in OPERATIONS:
            values = {key: x for key, x in operation.items() if key not in ("op", "at")}
            for key in values:
                if key == "path" or key.endswith("_path"):
                    values[key] = str((self.folder / values[key]).absolute())
            OPERATIONS[name](client, self.run_id, **values)
        return False

    def _begin(self, client: Any, begin: dict[str, Any]) -> bool:
        file, location, origin = sqlite_file(self._uri), None, None
        if begin.get("store") == self._store:
            location = begin.get("artifact_location")
        if location is None and file is not None:
            location = (file.parent / "artifacts").absolute().as_uri()
        if begin.get("curves"):
            origin = _state(self.folder / begin["curves"]).get(store_name(self._uri, self.folder / begin["curves"]), {})
        run = open_run(client, begin, self.run_id, location, origin.get("run_id") if origin else None)
        gone = self.run_id is not None and run.info.run_id != self.run_id
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        return gone

    def _load(self) -> None:
        state = _state(self.folder).get(self._store, {})
        self.offset = min(int(state.get("offset", 0)), whole_size(self.folder))
        self.run_id, self.experiment_id = state.get("run_id"), state.get("experiment_id")

    def _keep(self, offset: int) -> None:
        self.offset = offset
        state = {"offset": offset, "run_id": self.run_id, "experiment_id": self.experiment_id}
        content = json.dumps({**_state(self.folder), self._store: state}, indent=1)
        write_atomically(self.folder / _STATE, content.encode())

    def _lose(self, operation: dict[str, Any]) -> None:
        if operation["op"] == "metrics":
            self.lost_values += len(operation["values"])
        else:
            self.lost_others += 1


def is_shipped(folder: Path) -> bool:
    """Tell whether the store that a journal names has all of it; none has to."""
    begin = last_begin(folder)
    if begin is None or begin.get("store") is None:
        return True
    return int(_state(folder).get(begin["store"], {}).get("offset", 0)) >= whole_size(folder)


def remove(folder: Path) -> None:
    """Remove a journal, what was copied beside it, and how far it was shipped."""
    for name in (JOURNAL, _STATE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / COPIES, ignore_errors=True)


def _state(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _STATE).read_bytes()))
    except (OSError, ValueError):
        return {}  # all is shipped again, which does no harm


def _is_plain(operation: dict[str, Any]) -> bool:
    """Tell whether it is of numbers that go with others in a request."""
    return operation["op"] == "metrics" and not operation.keys() - {"op", "at", "step", "values"}


def _is_refused(error: BaseException, attempts: int) -> bool:
    return type(error) in (ValueError, TypeError) or is_refusal(error, attempts)


def _log_metrics(client: Any, run_id: str, operations: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    first = operations[0]
    if not _is_plain(first):  # of a data set or a model
        about = {key: x for key, x in first.items() if key not in ("op", "at", "step", "values")}
        for name, value in first["values"].items():
            client.log_metric(run_id, name, float(value), first["at"], first["step"], synchronous=True, **about)
        return
    metrics = [
        Metric(name, float(value), operation["at"], operation["step"])
        for operation in operations
        for name, value in operation["values"].items()
    ]
    for i in range(0, len(metrics), _VALUES_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[i : i + _VALUES_PER_REQUEST], synchronous=True)
