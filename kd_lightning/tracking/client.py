"""MLflow's client, whose writes to a run wait for nobody. Imports MLflow: itself only where that is wanted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from kd_lightning.tracking.journal import Journal


class JournalClient(MlflowClient):
    """Writes what is logged to a run into its journal.

    ``log_text``, ``log_dict``, ``log_figure`` and the like end in ``log_artifact``. What reads (``get_run``), makes
    something (``create_run``) or is of another run goes to the store at once, as in MLflow's own client.

    Args:
        uri: The store's address; it is not asked before something is read.
        journal_of: Returns the journal of a run, given its id; None for another's.
    """

    def __init__(self, uri: str, journal_of: Callable[[str], Journal | None]) -> None:
        self._uri, self._journal_of = uri, journal_of

    def __getattr__(self, name: str) -> Any:
        """Become MLflow's client when one of its attributes is asked for: that opens a database."""
        if name.startswith("__") or not self.__dict__ or "_tracking_client" in self.__dict__:
            raise AttributeError(name)
        super().__init__(self._uri)
        return getattr(self, name)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> None:
        journal = self._journal_of(run_id)
        if journal is None:
            super().log_batch(run_id, metrics, params, tags, synchronous)
            return
        if params:
            journal.write("params", values={param.key: str(param.value) for param in params})
        if tags:
            journal.write("tags", values={tag.key: str(tag.value) for tag in tags})
        for metric in metrics:
            journal.metrics({metric.key: metric.value}, metric.step, metric.timestamp)

    def log_metric(
        self,
        run_id: str,
        key: str,
        value: float,
        timestamp: int | None = None,
        step: int | None = None,
        synchronous: bool | None = None,
        dataset_name: str | None = None,
        dataset_digest: str | None = None,
        model_id: str | None = None,
    ) -> None:
        about = {"dataset_name": dataset_name, "dataset_digest": dataset_digest, "model_id": model_id}
        journal = self._journal_of(run_id)
        if journal is None:
            super().log_metric(run_id, key, value, timestamp, step, synchronous, **about)
        else:
            journal.metrics({key: value}, step, timestamp, **{name: of for name, of in about.items() if of})

    def log_param(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        journal = self._journal_of(run_id)
        if journal is None:
            return super().log_param(run_id, key, value, synchronous)
        journal.write("params", values={key: str(value)})
        return value

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
        journal = self._journal_of(run_id)
        if journal is None:
            super().set_tag(run_id, key, value, synchronous)
        else:
            journal.write("tags", values={key: str(value)})

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        journal = self._journal_of(run_id)
        if journal is None:
            super().set_terminated(run_id, status, end_time)
        else:
            journal.end(status or "FINISHED", end_time)

    def log_artifact(self, run_id: str, local_path: Any, artifact_path: str | None = None) -> None:
        journal, path = self._journal_of(run_id), Path(local_path)
        if journal is None:
            super().log_artifact(run_id, local_path, artifact_path)
        elif path.is_dir():
            journal.artifact(path, f"{artifact_path}/{path.name}" if artifact_path else path.name, copy=True)
        else:
            journal.artifact(path, artifact_path, copy=True)

    def log_artifacts(self, run_id: str, local_dir: Any, artifact_path: str | None = None) -> None:
        journal = self._journal_of(run_id)
        if journal is None:
            super().log_artifacts(run_id, local_dir, artifact_path)
        else:
            journal.artifact(Path(local_dir), artifact_path, copy=True)
