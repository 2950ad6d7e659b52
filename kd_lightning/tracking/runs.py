"""A pipeline's runs: one parent, and a child for each stage and seed. Each has its journal, with MLflow or without."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from filelock import Timeout
from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.tracking.calls import without_credentials
from kd_lightning.tracking.journal import is_ended, last_begin, own_begin
from kd_lightning.tracking.journal_logger import JournalLogger
from kd_lightning.tracking.logger import MLFlowLogger, safe_name
from kd_lightning.tracking.shipper import PATIENCE, Shipper
from kd_lightning.tracking.shipping import is_shipped, remove
from kd_lightning.tracking.store import store_name
from kd_lightning.tracking.sweeps import Sweep, SweptPipeline, swept_pipelines
from kd_lightning.tracking.view import look, place

_PATIENCE_WHEN_INTERRUPTED = 4.0
_log = logging.getLogger(__name__)
RunLogger = MLFlowLogger | JournalLogger


def is_rank_zero() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0


class StoredRuns(NamedTuple):
    """Which runs of a pipeline a store has.

    Attributes:
        store: As the parent's journal names it; None where no store is asked.
        experiment: Its id.
        runs: Their ids.
    """

    store: str | None = None
    experiment: str | None = None
    runs: tuple[str, ...] = ()


class MakeLogger(Protocol):
    """Makes the logger of a run."""

    def __call__(self, *, run_name: str, tags: Mapping[str, Any]) -> RunLogger: ...


class Tracking:
    """Begins, fills and closes the runs of one pipeline, in their journals; does nothing on ranks other than 0.

    Only the parent's store is waited for. Nothing else here waits or raises while stages run; :meth:`close` waits until
    the store has all.

    Args:
        make_logger: None for the journals alone.
        name: The parent run's name.
        config: Of the whole pipeline; logged as the parent's parameters.
        sweep: Of which the pipeline is a job.
        folder: The parent's. A parent that was interrupted, or whose store does not have all of it, is gone on with.

    Raises:
        OSError: When the store is away and required.
        ValueError: When it does not take the run.
    """

    def __init__(
        self,
        make_logger: MakeLogger | None,
        name: str,
        config: Mapping[str, Any],
        folder: Path,
        sweep: Sweep | None = None,
    ) -> None:
        self._make_logger: MakeLogger = make_logger or JournalLogger
        self._parent: RunLogger | None = None
        self._folder = folder
        self._loggers: dict[str, RunLogger] = {}
        self._open: list[str] = []
        self._of = sweep
        self._sweep: RunLogger | None = None
        self._swept: list[str] = []
        self.runs: dict[str, str] = {}
        """Children by name: the keys of their journals."""
        if is_rank_zero():
            if is_ended(folder, "FINISHED") and is_shipped(folder):
                remove(folder)
            self._parent = self._make_logger(run_name=name, tags={"kd.role": "pipeline", **look("pipeline", 0)})
            swept = {} if sweep is None else sweep.params
            self._swept = list(swept)
            key = None if sweep is None else self._begin(sweep)
            self._parent.begin(folder, _params(config) | swept, key, wait=True, lasts=True)
            self._began(self._parent)

    @property
    def run_id(self) -> str | None:
        """The parent's key."""
        return next(iter(self._loggers), None)

    @property
    def stored_run_id(self) -> str | None:
        """The parent's id in the store, as soon as that has it."""
        found = self._parent.run_id if self._parent else None
        return found if found != self.run_id else None

    def share_views(self, headline: str, figures: Sequence[str], lower_is_better: bool) -> None:
        """Have MLflow show the runs side by side, and the pipelines of a sweep.

        Args:
            headline: Its key.
            figures: Metrics that are columns, beside it.
            lower_is_better: Of the headline.
        """
        self.log(self.run_id, "comparison", headline=headline, figures=figures)
        if self._sweep is not None:
            self._sweep.journal.write(
                "sweep", headline=headline, parameters=self._swept, lower_is_better=lower_is_better
            )

    def describe_sweep(self, write: Callable[[Sequence[SweptPipeline]], str]) -> None:
        """Have the sweep's run say what its pipelines have found so far.

        Args:
            write: Gives the Markdown.
        """
        if self._parent is None or self._of is None:
            return
        if self._sweep is None:  # another job was at it, and may have ended
            self._begin(self._of)
        if self._sweep is not None:
            self._parent.journal.sync()
            text = write(swept_pipelines(self._folder.parent, self._sweep.journal.key))
            self._sweep.journal.write("tags", values={"mlflow.note.content": text})

    def places(self) -> list[str]:
        """Say where the views are, one to a line; nothing where no store has them."""
        found = []
        for what, logger in (("run", self._parent), ("pipeline of the sweep", self._sweep)):
            if isinstance(logger, MLFlowLogger) and logger.experiment_id is not None:
                found.append(place(what, str(logger.tracking_uri), logger.experiment_id, str(logger.run_id)))
        return found

    def stored(self) -> StoredRuns | None:
        """Return where the runs are; None where the store lacks something, which the same command ships."""
        if self._shipper is None:
            return StoredRuns()
        if self._shipper.undelivered() is not None:
            return None
        assert isinstance(self._parent, MLFlowLogger)
        runs = [logger.run_id for logger in self._loggers.values() if isinstance(logger, MLFlowLogger)]
        store = store_name(str(self._parent.tracking_uri), self._folder)
        return StoredRuns(store, self._parent.experiment_id, tuple(str(run) for run in runs))

    def logger(self, name: str, tags: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> RunLogger | None:
        """Return the logger of a stage that is trained; its run is gone on with, whatever its parent was.

        Args:
            name: The run's name.
            tags: Of the run.
            config: The run's parameters.
            folder: The stage's.
        """
        return self._child(name, tags, config, folder)

    def reused(self, name: str, tags: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
        """Go on with the run of a stage that was finished before, where that is under this parent.

        Otherwise a new one is begun in the parent's folder, with the curves of the stage's, so that all rows of a
        comparison stand side by side.
        """
        begin = own_begin(folder) if self._parent is not None else None
        ours = begin is not None and begin["parent"] == self.run_id
        self._child(name, tags, config, folder if ours else self._beside(folder), folder if begin else None)

    def log(self, run_id: str | None, op: str, **values: Any) -> None:
        """Log an operation of :data:`~kd_lightning.tracking.operations.OPERATIONS`."""
        if run_id is not None:
            self._loggers[run_id].journal.write(op, **values)

    def metrics(self, run_id: str | None, values: Mapping[str, float | None], at: int | None = None) -> None:
        """Log final values of a run, those that are known; ``at`` in milliseconds since 1970, now by default."""
        known = {name: value for name, value in values.items() if value is not None}
        if run_id is not None and known:
            self._loggers[run_id].journal.metrics(known, at=at)

    def artifact(self, run_id: str | None, file: Path) -> None:
        """Log a file that stays as it is."""
        if run_id is not None:
            self._loggers[run_id].journal.artifact(file, copy=False)

    def text(self, run_id: str | None, text: str, name: str) -> None:
        if run_id is not None:
            self._loggers[run_id].journal.text(text, name)

    def tag(self, run_id: str | None, key: str, value: str) -> None:
        self.log(run_id, "tags", values={key: value})

    def finish(self, run_id: str | None, status: str = "FINISHED") -> None:
        if run_id is not None:
            self._loggers[run_id].journal.end(status)
            self._open = [other for other in self._open if other != run_id]

    def settle(self) -> None:
        """Wait until the background is quiet, as before a timing: all is shipped, or the store is away."""
        if self._shipper is not None:
            self._shipper.flush(patience=0, request=5)

    def close(self, status: str) -> None:
        """End what is open, the parent last, and wait for what is not shipped, but not for a store that is away.

        Args:
            status: ``FINISHED``, ``FAILED``, or ``KILLED``, with which it waits less.
        """
        for run_id in reversed(self._open):
            self.finish(run_id, status)
        if self._sweep is not None:  # until the next job, if there is one
            self._sweep.journal.end(status)
        if self._shipper is not None:
            if status == "KILLED":
                self._shipper.flush(_PATIENCE_WHEN_INTERRUPTED, request=_PATIENCE_WHEN_INTERRUPTED)
            else:
                self._shipper.flush(PATIENCE)
            missing = self._shipper.undelivered()
            if missing is not None:
                complete = "what was trained is on the disk, and complete; " if status == "FINISHED" else ""
                _log.warning(
                    "%s: %skd-lightning-sync %s ships them, or the same command", missing, complete, self._folder.parent
                )
        for logger in self._loggers.values():
            logger.journal.close()
        if self._sweep is not None:
            self._sweep.journal.close()

    @property
    def _shipper(self) -> Shipper | None:
        return None if not isinstance(self._parent, MLFlowLogger) or self._parent.offline else self._parent.shipper

    def _begin(self, sweep: Sweep) -> str:
        """Begin the sweep's run, or go on with it, and return its key."""
        logger = self._make_logger(run_name=sweep.name, tags={"kd.role": "sweep", **look("sweep", 0)})
        try:
            logger.begin(sweep.folder, wait=True, lasts=True)
        except Timeout:  # a job that runs beside this one is at it
            begun = last_begin(sweep.folder)
            return str(begun["key"]) if begun is not None else ""
        self._sweep = logger
        return logger.journal.key

    def _child(
        self,
        name: str,
        tags: Mapping[str, Any],
        config: Mapping[str, Any],
        folder: Path,
        curves: Path | None = None,
    ) -> RunLogger | None:
        if self._parent is None:
            return None
        opened = next((key for key, logger in self._loggers.items() if logger.journal.folder == folder), None)
        if opened is not None:  # a variant that is the same as another
            self.runs[name] = opened
            return self._loggers[opened]
        child = self._make_logger(run_name=name, tags={**tags, "kd.pipeline": self.run_id})
        try:
            child.begin(folder, _params(config), self.run_id, curves, wait=False, lasts=True)
        except Timeout:  # another process is at work on that run
            child.begin(self._beside(folder), _params(config), self.run_id, curves, wait=False, lasts=True)
        self._began(child)
        self.runs[name] = child.journal.key
        return child

    def _beside(self, stage: Path) -> Path:
        """Return a folder in the parent's for a run of a stage."""
        folder = self._folder / stage.name
        begin = last_begin(folder)
        if begin is not None and begin["parent"] != self.run_id:  # which was here before
            if not is_shipped(folder):
                return self._folder / f"{stage.name}-{uuid4().hex[:8]}"
            remove(folder)
        return folder

    def _began(self, logger: RunLogger) -> None:
        self._loggers[logger.journal.key] = logger
        self._open.append(logger.journal.key)


def _params(config: Any, prefix: str = "") -> dict[str, str]:
    """Flatten a configuration to parameters as Lightning's logger names them, without anybody's password."""
    if not isinstance(config, Mapping):
        return {prefix: without_credentials(str(config))[:250]}
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= _params(value, f"{prefix}/{safe_name(str(key))}" if prefix else safe_name(str(key)))
    return found
