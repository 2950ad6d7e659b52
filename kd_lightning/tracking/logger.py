"""Lightning's MLflow logger, with a journal of its own, on a local SQLite store unless told otherwise."""

import logging
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from kd_lightning.durable_files import remove_leftovers, temporary_suffix
from kd_lightning.namespaces import of_both
from kd_lightning.tracking.calls import REQUEST_SECONDS, StoreAwayError, within
from kd_lightning.tracking.journal import JOURNAL, Journal, last_begin
from kd_lightning.tracking.origin import git_tags
from kd_lightning.tracking.shipper import PATIENCE, Shipper, shipper_to
from kd_lightning.tracking.shipping import Shipment, remove
from kd_lightning.tracking.sqlite import check_database, create_database, sqlite_file
from kd_lightning.tracking.store import check_store, one_line_errors, plain_client, store_name, store_uri
from kd_lightning.tracking.system import SystemMetrics

_log = logging.getLogger(__name__)


class MLFlowLogger(loggers.MLFlowLogger):
    """Log to ``mlruns/mlflow.db`` in the working directory, or where ``MLFLOW_TRACKING_URI`` or the argument say.

    What is logged, also through ``logger.experiment``, goes into the run's journal first, and from there to the store
    in the background (:class:`~kd_lightning.tracking.shipper.Shipper`): a store that is away, from the start or later,
    stops and delays nothing. It is said once, and the store gets what it has missed when it is back. The end of the
    training waits until it has all, or for ``patience`` seconds in which nothing can be shipped; the rest is shipped by
    ``kd-lightning-sync``, or by the next training that logs there.

    The journal is ``journals/<key>/journal.jsonl`` beside a SQLite store, or in ``mlruns`` for a server; a stage of the
    pipeline has it in its own folder.

    Args:
        experiment_name: The MLflow experiment; created where it does not exist.
        tracking_uri: A server's address or a database URI. Plain folders (``file:``) are refused by MLflow 3.
        run_name: As the dashboard shows it.
        tags: Of the run.
        run_id: Goes on with that run.
        artifact_location: Of a new experiment; beside a SQLite file by default.
        log_model: See Lightning's ``MLFlowLogger``.
        prefix: Before each metric's name.
        patience: Seconds.
        offline: Writes the journal alone, and asks no store.
        required: Refuses to begin where the store is away.
        log_system_metrics: Measures processors, memory, disk, network and GPUs while a Trainer trains, every 10 s or
            ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL``, under MLflow's names: ``system/cpu_utilization_percentage``.

    Raises:
        ValueError: For an experiment without a name, and for ``offline`` with ``required``.
        OSError: When the folder of a SQLite store cannot be written to, or its database is damaged, before anything is
            trained: neither heals by itself, and a user has to choose. One that is locked is away, as a server may be.
            On first use (``Trainer.fit`` begins), with ``required``: when the store does not answer.
    """

    def __init__(
        self,
        experiment_name: str = "kd-lightning",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        artifact_location: str | None = None,
        log_model: bool | Literal["all"] = False,
        prefix: str = "",
        patience: float = PATIENCE,
        offline: bool = False,
        required: bool = False,
        log_system_metrics: bool = False,
    ) -> None:
        if not experiment_name:
            raise ValueError(f"expected experiment_name to be a name, got {experiment_name!r}: leave it out")
        if offline and required:
            raise ValueError("expected offline or required, got both: a store that is not asked cannot be required")
        _register()
        uri = store_uri(tracking_uri)
        file = sqlite_file(uri)
        if file is not None:
            _check_writable_once(file.parent.absolute())
            if not offline:
                _check_database_once(file.absolute())
                create_database(file)
        with one_line_errors(uri):
            super().__init__(
                experiment_name=experiment_name,
                run_name=run_name,
                tracking_uri="http://localhost",  # Lightning's own client, which is not used, would open a database
                tags={key: str(value) for key, value in tags.items()} if tags else None,  # a server takes nothing else
                run_id=run_id,
                artifact_location=artifact_location,
                log_model=log_model,
                prefix=prefix,
            )
            from kd_lightning.tracking.client import JournalClient

            self._mlflow_client = JournalClient(uri, self._journal_of)
        self._tracking_uri = self.tracking_uri = uri
        self.patience, self.offline, self.required = patience, offline, required
        self._journal: Journal | None = None
        self._lasts = False
        self._shipment: Shipment | None = None
        self._measures_system = log_system_metrics
        self._system: SystemMetrics | None = None
        self._metric_names: dict[str, str] = {}

    @property
    def shipper(self) -> Shipper:
        """What feeds the store."""
        return shipper_to(self._tracking_uri)

    @property
    def journal(self) -> Journal:
        """Of the run."""
        _ = self.experiment
        assert self._journal is not None
        return self._journal

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client; what it logs waits for nobody. The first access begins the run, or goes on with it.

        Raises:
            OSError: At the first access, when the store does not answer and is required.
            ValueError: When the store has no such run, or the experiment was deleted.
        """
        if not self._initialized:
            self.begin()
        return self._mlflow_client

    def begin(
        self,
        folder: Path | None = None,
        params: Mapping[str, str] | None = None,
        parent: str | None = None,
        curves: Path | None = None,
        wait: bool = True,
        lasts: bool = False,
    ) -> None:
        """Begin the run, or go on with it.

        Args:
            folder: Of the journal; one that is there is gone on with.
            params: Of a run that has none yet.
            parent: The key of the run under which it stands.
            curves: Folder of another run's journal, whose numbers a new run takes over.
            wait: For the store to have the run, or to be away. Without it, this is done in the background.
            lasts: Whether it goes on after the training, so that :meth:`finalize` does not close it.

        Raises:
            filelock.Timeout: When another process goes on with the run of that folder.
        """
        wait = wait and not self.offline and self._answers(lambda: check_store(self._tracking_uri))
        root, given = self._root(), self._run_id
        if folder is None:
            folder = root / (given if given and (root / given / JOURNAL).is_file() else uuid4().hex)
        journal = Journal(folder)
        is_new = last_begin(folder) is None
        journal.begin(
            key=folder.name if folder.parent == root else None,
            curves=curves,
            experiment=self._experiment_name,
            name=self._run_name,
            tags=self.tags or {},
            context=_context(),
            params=dict(params or {}),
            parent=parent,
            store=store_name(self._tracking_uri, folder),
            artifact_location=self._artifact_location,
            run_id=given if is_new else None,
        )
        try:
            if not self.offline:
                self._feed_store(journal, wait)
        except BaseException as error:
            if not isinstance(error, Exception):  # a signal, while nobody else knows of the run
                journal.end("KILLED")
            journal.close()
            if is_new and isinstance(error, Exception):
                remove(folder)
            elif not self.offline:
                self.shipper.add(journal.folder)  # so that its end is shipped with the rest
            raise
        if not self.offline and parent is None:
            self.shipper.adopt(folder.parent)
        self._initialized, self._run_id, self._journal, self._lasts = True, journal.key, journal, lasts

    @property
    def run_id(self) -> str | None:
        """The run's id; its journal's key as long as the store has not given it one."""
        _ = self.experiment
        return self._shipment.run_id if self._shipment and self._shipment.run_id else self._run_id

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; None as long as the store has not given it one."""
        _ = self.experiment
        return self._shipment.experiment_id if self._shipment else None

    @property
    def name(self) -> str | None:
        """The experiment's id, or its name as long as it has none."""
        return self.experiment_id or self._experiment_name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of a step."""
        if self._measures_system and self._system is None:
            self._system = SystemMetrics(self.journal.metrics)
        numbers = {self._metric_name(name): value for name, value in metrics.items() if not isinstance(value, str)}
        self.journal.metrics(numbers, step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """Log parameters, under names that MLflow takes."""
        super().log_hyperparams(_with_safe_names(params))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Close the run, and wait for what is not shipped yet, but not for a store that is away."""
        if not self._initialized:
            return
        if self._system is not None:
            self._system.stop()
            self._system = None
        if self._checkpoint_callback is not None:
            self._scan_and_log_checkpoints(self._checkpoint_callback)
        if self._lasts:
            return
        self.journal.end("FAILED" if status == "failed" else "FINISHED")
        self.journal.close()
        if self.patience > 0 and not self.offline and not self.shipper.flush(self.patience):
            _log.warning(
                "%s: they are kept in %s, and shipped by kd-lightning-sync %s; the training itself is complete",
                self.shipper.undelivered(),
                self.journal.folder,
                self.journal.folder,
            )

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Have the disk keep what was logged before a checkpoint from which a training may go on."""
        if self._initialized:
            self.journal.hurry()
        super().after_save_checkpoint(checkpoint_callback)

    def _answers(self, ask: Callable[[], object]) -> bool:
        """Tell whether the store can be used; a line says where it is away.

        Raises:
            OSError: Where it is away and required.
        """
        try:
            ask()
        except StoreAwayError as error:
            if self.required:
                raise
            self.shipper.is_away(error.what)
            return False
        return True

    def _feed_store(self, journal: Journal, wait: bool) -> None:
        if wait:
            self._answers(lambda: self._make_run(journal))
        self._shipment = self.shipper.add(journal)
        import mlflow

        mlflow.set_tracking_uri(self._tracking_uri)  # as Lightning's logger does

    def _make_run(self, journal: Journal) -> None:
        """Let the store have the run before the training begins."""
        journal.sync()
        shipment = Shipment(journal.folder, self._tracking_uri)
        try:
            with one_line_errors(self._tracking_uri):
                within(REQUEST_SECONDS, lambda: shipment.advance(lambda: plain_client(self._tracking_uri)))
        except StoreAwayError as error:
            if shipment.refused:
                raise ValueError(str(error)) from None
            raise

    def _root(self) -> Path:
        """Return the folder of journals that have no other place."""
        file = sqlite_file(self._tracking_uri)
        return (Path("mlruns") if file is None else file.parent).absolute() / "journals"

    def _journal_of(self, run_id: str) -> Journal | None:
        return self._journal if run_id in (self._run_id, self.run_id) else None

    def _metric_name(self, name: str) -> str:
        if name not in self._metric_names:
            whole = f"{self._prefix}{self.LOGGER_JOIN_CHAR}{name}" if self._prefix else name
            self._metric_names[name] = taken = re.sub(r"[^a-zA-Z0-9_/. -]+", "", whole)
            if taken != whole:
                rank_zero_warn(f"MLflow takes no metric of the name {whole!r}: it is logged as {taken!r}")
        return self._metric_names[name]


def _register() -> None:
    """Make it a logger of ``pytorch_lightning`` as well, once that is imported: ``LightningCLI`` looks at the class."""
    for kind in of_both(loggers.Logger):
        kind.register(MLFlowLogger)  # type: ignore[attr-defined]


_register()


def safe_name(name: str) -> str:
    """Replace what MLflow takes in no name, such as the '=' of a label ``T=4``."""
    return re.sub(r"[^\w.\- :/]", "-", name, flags=re.ASCII)


def _with_safe_names(params: Any) -> Any:
    if isinstance(params, Namespace):
        params = vars(params)
    if not isinstance(params, Mapping):
        return params
    return {safe_name(str(key)): _with_safe_names(value) for key, value in params.items()}


def check_writable(folder: Path, megabytes: int = 64, name: str = "") -> None:
    """Create the folder and write ``megabytes`` to it, as a full disk shows only then.

    Args:
        folder: Any.
        megabytes: How much.
        name: What the user calls the folder, for the error.

    Raises:
        OSError: With the folder and what to do.
    """
    probe = folder / f".probe{temporary_suffix()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)  # probes of processes that were killed
        with probe.open("wb") as file:
            for _ in range(megabytes):
                file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        where = f"{name}: " if name else ""
        raise OSError(
            error.errno,
            f"{where}cannot write {megabytes} MB to {folder.absolute()} ({error.strerror}), expected room for "
            "checkpoints and the tracking store: free some, or change to another working directory",
        ) from error
    finally:
        with suppress(OSError):  # the folder's own error tells more
            probe.unlink()


@cache
def _context() -> dict[str, str]:
    """Return who runs what: user, program, commit."""
    from mlflow.tracking.context.registry import resolve_tags

    return dict(resolve_tags(git_tags()))


@cache
def _check_database_once(file: Path) -> None:
    """Refuse a damaged database for the first of a process's loggers; one that is locked is away, as a server is."""
    with suppress(StoreAwayError):
        check_database(file)


@cache
def _check_writable_once(folder: Path) -> None:
    """Check a folder for the first of a process's loggers: a pipeline makes one for each stage and seed."""
    check_writable(folder)
