"""A pipeline's runs in MLflow: one parent, and a child for each stage and seed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.tracking.logger import MLFlowLogger


def is_rank_zero() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0


class MakeLogger(Protocol):
    """Makes a logger for a new run, or for one to go on with."""

    def __call__(self, *, run_name: str, tags: Mapping[str, Any], run_id: str | None) -> MLFlowLogger: ...


class Tracking:
    """Creates, fills and closes the runs of one pipeline; does nothing without a logger, or on ranks other than 0.

    Args:
        make_logger: None to log nothing.
        name: Of the parent run.
        config: Of the whole pipeline; logged as the parent's parameters.
        run_id: A parent to go on with, after an interruption; a new one where it is gone.
    """

    def __init__(
        self, make_logger: MakeLogger | None, name: str, config: Mapping[str, Any], run_id: str | None = None
    ) -> None:
        self._make_logger = make_logger if is_rank_zero() else None
        self._parent = self._open(name, {"kd.role": "pipeline"}, run_id)
        if self._parent is not None:
            self._log_config(self._parent, config)

    @property
    def run_id(self) -> str | None:
        """The parent's id."""
        return self._parent.run_id if self._parent else None

    def logger(
        self, name: str, tags: Mapping[str, Any], config: Mapping[str, Any], run_id: str | None = None
    ) -> MLFlowLogger | None:
        """Return the logger of a child run: a new one, or one to go on with."""
        if self._parent is None:
            return None
        tags = {**tags, "kd.pipeline": self.run_id, "mlflow.parentRunId": self.run_id}
        child = self._open(name, tags, run_id)
        assert child is not None
        for key, value in tags.items():  # an interrupted run may have had another parent
            child.experiment.set_tag(child.run_id, key, str(value))
        self._log_config(child, config)
        return child

    def is_child(self, run_id: str | None) -> bool:
        """Tell whether a run is there, under this parent."""
        if self._parent is None or run_id is None:
            return False
        run = _find(self._parent, run_id)
        return run is not None and run.data.tags.get("mlflow.parentRunId") == self.run_id

    def metrics(self, run_id: str | None, values: Mapping[str, float | None]) -> None:
        """Log final values of a run, those that are known."""
        known = {key: value for key, value in values.items() if value is not None}
        self._do(run_id, lambda client: [client.log_metric(run_id, key, value) for key, value in known.items()])

    def artifact(self, run_id: str | None, file: Path) -> None:
        self._do(run_id, lambda client: client.log_artifact(run_id, str(file)))

    def text(self, run_id: str | None, text: str, name: str) -> None:
        self._do(run_id, lambda client: client.log_text(run_id, text, name))

    def tag(self, run_id: str | None, key: str, value: str) -> None:
        self._do(run_id, lambda client: client.set_tag(run_id, key, value))

    def finish(self, run_id: str | None, status: str = "FINISHED") -> None:
        self._do(run_id, lambda client: client.set_terminated(run_id, status))

    def _do(self, run_id: str | None, action: Callable[[Any], object]) -> None:
        if self._parent is not None and run_id is not None:
            action(self._parent.experiment)

    def _open(self, name: str, tags: Mapping[str, Any], run_id: str | None) -> MLFlowLogger | None:
        if self._make_logger is None:
            return None
        if run_id is not None:
            logger = self._make_logger(run_name=name, tags=tags, run_id=run_id)
            if _find(logger, run_id) is not None:
                logger.experiment.update_run(run_id, status="RUNNING")
                return logger
        return self._make_logger(run_name=name, tags=tags, run_id=None)

    def _log_config(self, logger: MLFlowLogger, config: Mapping[str, Any]) -> None:
        if not logger.experiment.get_run(logger.run_id).data.params:  # parameters cannot change in a run gone on with
            logger.log_hyperparams(dict(config))


def _find(logger: MLFlowLogger, run_id: str) -> Any | None:
    """Return the run, None where the store does not have it (any more)."""
    from mlflow.exceptions import MlflowException

    try:
        run = logger._mlflow_client.get_run(run_id)
    except MlflowException:
        return None
    return run if run.info.lifecycle_stage == "active" else None
