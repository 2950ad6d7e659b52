"""A pipeline's runs in MLflow: one parent, and a child for each stage and seed."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.tracking.calls import without_credentials
from kd_lightning.tracking.delivery import PATIENCE
from kd_lightning.tracking.logger import MLFlowLogger, safe_name

_PATIENCE_WHEN_INTERRUPTED = 4.0
_log = logging.getLogger(__name__)


def is_rank_zero() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0


class MakeLogger(Protocol):
    """Makes a logger for a new run, or for one to go on with."""

    def __call__(self, *, run_name: str, tags: Mapping[str, Any], run_id: str | None) -> MLFlowLogger: ...


class Tracking:
    """Creates, fills and closes the runs of one pipeline; does nothing without a logger, or on ranks other than 0.

    Only the parent is waited for. All else goes to the store in the background, so that nothing here waits or raises
    while stages run; :meth:`close` waits for it.

    Args:
        make_logger: None to log nothing.
        name: The parent run's name.
        config: Of the whole pipeline; logged as the parent's parameters.
        run_id: A parent to go on with, after an interruption; a new one where it is gone.
        known: See :meth:`MLFlowLogger.begin`.

    Raises:
        OSError: When the store does not answer.
    """

    def __init__(
        self,
        make_logger: MakeLogger | None,
        name: str,
        config: Mapping[str, Any],
        run_id: str | None = None,
        known: Callable[[str], object] | None = None,
    ) -> None:
        self._make_logger = make_logger if is_rank_zero() else None
        self._parent: MLFlowLogger | None = None
        self._open: list[str] = []
        self.runs: dict[str, str] = {}
        """Children by name."""
        if self._make_logger is not None:
            self._parent = self._make_logger(run_name=name, tags={"kd.role": "pipeline"}, run_id=run_id)
            self._parent.begin(lambda run: True, _params(config), known)
            assert self._parent.run_id is not None
            self._open.append(self._parent.run_id)

    @property
    def run_id(self) -> str | None:
        """The parent's id."""
        return self._parent.run_id if self._parent else None

    def logger(
        self,
        name: str,
        tags: Mapping[str, Any],
        config: Mapping[str, Any],
        run_id: str | None = None,
        known: Callable[[str], object] | None = None,
    ) -> MLFlowLogger | None:
        """Return the logger of a child run: a new one, or one to go on with, whatever its parent was.

        Args:
            name: The run's name.
            tags: Of the run.
            config: The run's parameters.
            run_id: Of the run to go on with.
            known: See :meth:`MLFlowLogger.begin`.
        """
        return self._child(name, tags, config, run_id, lambda run: True, known)

    def reused(
        self,
        name: str,
        tags: Mapping[str, Any],
        config: Mapping[str, Any],
        run_id: str | None,
        known: Callable[[str], object],
    ) -> None:
        """Go on with the run of a stage that was finished before, where that is under this parent.

        Otherwise a new one is made, so that all rows of a comparison stand side by side.
        """
        self._child(
            name, tags, config, run_id, lambda run: run.data.tags.get("mlflow.parentRunId") == self.run_id, known
        )

    def metrics(self, run_id: str | None, values: Mapping[str, float | None]) -> None:
        """Log final values of a run, those that are known."""
        if self._parent is not None and run_id is not None:
            for key, value in values.items():
                if value is not None:
                    self._parent.experiment.log_metric(run_id, key, value)

    def artifact(self, run_id: str | None, file: Path) -> None:
        """Log a file that stays as it is."""
        if self._parent is not None and run_id is not None:
            self._parent.delivery.file(run_id, file, copy=False)

    def text(self, run_id: str | None, text: str, name: str) -> None:
        if self._parent is not None and run_id is not None:
            self._parent.delivery.call(run_id, lambda client, known: client.log_text(known, text, name))

    def tag(self, run_id: str | None, key: str, value: str) -> None:
        if self._parent is not None and run_id is not None:
            self._parent.experiment.set_tag(run_id, key, value)

    def finish(self, run_id: str | None, status: str = "FINISHED") -> None:
        if self._parent is not None and run_id is not None:
            self._parent.experiment.set_terminated(run_id, status)
            id_of = self._parent.delivery.id_of
            self._open = [other for other in self._open if id_of(other) != id_of(run_id)]

    def settle(self) -> None:
        """Wait until the background is quiet, as before a timing: all is delivered, or the store is away."""
        if self._parent is not None:
            self._parent.delivery.flush(patience=0, request=5)

    def close(self, status: str) -> bool:
        """End what is open, the parent last, and wait for what is not delivered, but not for a store that is away.

        Args:
            status: ``FINISHED``, ``FAILED``, or ``KILLED``, with which it waits less.

        Returns:
            Whether the store has all.
        """
        if self._parent is None:
            return True
        for run_id in reversed(self._open):
            self.finish(run_id, status)
        delivery = self._parent.delivery
        if status == "KILLED":
            delivery.flush(_PATIENCE_WHEN_INTERRUPTED, request=_PATIENCE_WHEN_INTERRUPTED)
        else:
            delivery.flush(PATIENCE)
        missing = delivery.undelivered()
        if missing is not None:
            complete = "what was trained is on the disk, and complete; " if status == "FINISHED" else ""
            _log.warning(
                "%s: %sruns there may still be shown as running, which the same command goes on with and closes",
                missing,
                complete,
            )
        return missing is None

    def _child(
        self,
        name: str,
        tags: Mapping[str, Any],
        config: Mapping[str, Any],
        run_id: str | None,
        goes_on: Callable[[Any], bool],
        known: Callable[[str], object] | None,
    ) -> MLFlowLogger | None:
        if self._parent is None or self._make_logger is None:
            return None
        tags = {**tags, "kd.pipeline": self.run_id, "mlflow.parentRunId": self.run_id}
        child = self._make_logger(run_name=name, tags=tags, run_id=run_id)
        child.patience = 0  # close() waits
        child.begin_in_background(goes_on, _params(config), known)
        assert child.run_id is not None
        self._open.append(child.run_id)
        self.runs[name] = child.run_id
        return child


def _params(config: Any, prefix: str = "") -> dict[str, str]:
    """Flatten a configuration to parameters as Lightning's logger names them, without anybody's password."""
    if not isinstance(config, Mapping):
        return {prefix: without_credentials(str(config))[:250]}
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= _params(value, f"{prefix}/{safe_name(str(key))}" if prefix else safe_name(str(key)))
    return found
