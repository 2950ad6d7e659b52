"""Lightning's MLflow logger, on a local SQLite store unless told otherwise."""

import logging
import os
import re
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.durable_files import remove_leftovers, temporary_suffix
from kd_lightning.namespaces import of_both
from kd_lightning.tracking.calls import REQUEST_SECONDS, within
from kd_lightning.tracking.delivery import PATIENCE, Delivery, delivery_to
from kd_lightning.tracking.opening import OpenRun, new_key
from kd_lightning.tracking.sqlite import create_database, sqlite_file
from kd_lightning.tracking.store import check_store, one_line_errors, plain_client

_log = logging.getLogger(__name__)
LOCAL_STORE = "sqlite:///mlruns/mlflow.db"


class MLFlowLogger(loggers.MLFlowLogger):
    """Log to ``mlruns/mlflow.db`` in the working directory, or where ``MLFLOW_TRACKING_URI`` or the argument say.

    The store is asked once, when the training begins. From then on it stops and delays nothing: what is logged, also
    through ``logger.experiment``, goes to it in the background (:class:`~kd_lightning.tracking.delivery.Delivery`). A
    store that goes away is said once, and gets what it has missed when it is back. The end of the training waits until
    all is delivered, or for ``patience`` seconds in which nothing can be.

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

    Raises:
        ValueError: For an experiment without a name.
        OSError: When the folder of a SQLite store cannot be written to, or its database is damaged or locked; before
            anything is trained. On first use (``Trainer.fit`` begins): when the store does not answer.
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
    ) -> None:
        if not experiment_name:
            raise ValueError(f"expected experiment_name to be a name, got {experiment_name!r}: leave it out")
        _register()
        uri = store_uri(tracking_uri)
        file = sqlite_file(uri)
        if file is not None:
            _check_writable_once(file.parent.absolute())
            artifact_location = artifact_location or (file.parent / "artifacts").absolute().as_uri()
        if not uri.startswith(("http:", "https:")):  # a database is opened here, a server on first use
            _check_store_once(uri if file is None else f"sqlite:///{file.absolute()}")
        if file is not None:
            create_database(file)
        with one_line_errors(uri):
            super().__init__(
                experiment_name=experiment_name,
                run_name=run_name,
                tracking_uri=uri,
                tags={key: str(value) for key, value in tags.items()} if tags else None,  # a server takes nothing else
                run_id=run_id,
                artifact_location=artifact_location,
                log_model=log_model,
                prefix=prefix,
            )
            from kd_lightning.tracking.client import BackgroundClient

            self._mlflow_client = BackgroundClient(uri)
        self.tracking_uri = uri
        self.patience = patience

    @property
    def delivery(self) -> Delivery:
        """The queue of what is logged."""
        return delivery_to(self._tracking_uri)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client; what it logs waits for nobody. The first access makes the run, or finds it.

        Raises:
            OSError: At the first access, when the store does not answer.
            ValueError: When the store has no such run, or the experiment was deleted.
        """
        if not self._initialized:
            self.begin()
        return self._mlflow_client

    def begin(
        self,
        goes_on: Callable[[Any], bool] | None = None,
        params: Mapping[str, str] | None = None,
        known: Callable[[str], object] | None = None,
    ) -> None:
        """Make the run, or find it, and wait for that.

        Args:
            goes_on: Given the run of ``run_id``: whether to go on with it. By default it has to be there.
            params: Of a run that has none yet.
            known: Called with what finds the run again, given as ``run_id``: a key before it is made, then its id.
        """
        check_store(self._tracking_uri)
        opening = self._opening(goes_on, params, known)
        with one_line_errors(self._tracking_uri):
            run = within(REQUEST_SECONDS, lambda: opening(plain_client(self._tracking_uri), new_key(), False))
        self._run_id, self._experiment_id = run.info.run_id, run.info.experiment_id
        self._opened()

    def begin_in_background(
        self,
        goes_on: Callable[[Any], bool],
        params: Mapping[str, str],
        known: Callable[[str], object] | None = None,
    ) -> None:
        """Like :meth:`begin`, without waiting: for a run while a training is under way.

        Args:
            goes_on: As there.
            params: As there.
            known: As there.
        """
        opening, self._run_id = self._opening(goes_on, params, known), new_key()

        def make(client: Any, key: str, again: bool) -> str:
            run = opening(client, key, again)
            self._experiment_id = run.info.experiment_id
            return str(run.info.run_id)

        self.delivery.begin_run(self._run_id, make)
        self._opened()

    @property
    def run_id(self) -> str | None:
        """The run's id; a name that stands for it while the store has not answered yet."""
        _ = self.experiment
        return self.delivery.id_of(self._run_id) if self._run_id is not None else None

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """Log parameters, under names that MLflow takes."""
        super().log_hyperparams(_with_safe_names(params))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Close the run, and wait for what is not delivered yet, but not for a store that is away."""
        if not self._initialized:
            return
        if self._checkpoint_callback is not None:
            self._scan_and_log_checkpoints(self._checkpoint_callback)
        self.experiment.set_terminated(self._run_id, "FAILED" if status == "failed" else "FINISHED")
        if self.patience > 0 and not self.delivery.flush(self.patience):
            _log.warning("%s; the training itself is complete", self.delivery.undelivered())

    def _opening(
        self,
        goes_on: Callable[[Any], bool] | None,
        params: Mapping[str, str] | None,
        known: Callable[[str], object] | None,
    ) -> OpenRun:
        return OpenRun(
            experiment=self._experiment_name,
            artifact_location=self._artifact_location,
            run_name=self._run_name,
            tags=self.tags or {},
            run_id=self._run_id,
            goes_on=goes_on,
            params=params or {},
            known=known,
            start=int(time.time() * 1000),
        )

    def _opened(self) -> None:
        import mlflow

        mlflow.set_tracking_uri(self._tracking_uri)  # as Lightning's logger does
        self._initialized = True


def _register() -> None:
    """Make it a logger of ``pytorch_lightning`` as well, once that is imported: ``LightningCLI`` looks at the class."""
    for kind in of_both(loggers.Logger):
        kind.register(MLFlowLogger)  # type: ignore[attr-defined]


_register()


def store_uri(tracking_uri: str | None = None) -> str:
    """Return where runs go: the argument, the environment's ``MLFLOW_TRACKING_URI``, or the local store."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or LOCAL_STORE


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
def _check_store_once(uri: str) -> None:
    """Check a database for the first of a process's loggers, likewise."""
    check_store(uri)


@cache
def _check_writable_once(folder: Path) -> None:
    """Check a folder for the first of a process's loggers: a pipeline makes one for each stage and seed."""
    check_writable(folder)
