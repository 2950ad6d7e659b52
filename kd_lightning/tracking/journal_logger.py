"""A logger of a run's journal alone: what the pipeline uses without MLflow."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kd_lightning.tracking.journal import Journal


class JournalLogger(Logger):
    """Log to the journal in a folder; no store is asked.

    Args:
        run_name: As the report shows it.
        tags: Of the run.
        run_id: Not used: a journal that is in the folder is gone on with.
    """

    def __init__(self, run_name: str, tags: Mapping[str, Any] | None = None, run_id: str | None = None) -> None:
        super().__init__()
        self._name, self._tags = run_name, {key: str(value) for key, value in (tags or {}).items()}
        self._journal: Journal | None = None

    def begin(
        self,
        folder: Path,
        params: Mapping[str, str] | None = None,
        parent: str | None = None,
        curves: Path | None = None,
        wait: bool = False,
        lasts: bool = True,
    ) -> None:
        """Begin the run, or go on with it; see :meth:`MLFlowLogger.begin`."""
        self._journal = Journal(folder)
        self._journal.begin(
            curves=curves,
            experiment="kd-lightning",
            name=self._name,
            tags=self._tags,
            params=dict(params or {}),
            parent=parent,
            store=None,
        )

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "begin is called first"
        return self._journal

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return self.journal.key

    @property
    def run_id(self) -> str:
        """The journal's key."""
        return self.journal.key

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.journal.metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        values = vars(params) if isinstance(params, Namespace) else params
        self.journal.write("params", values={key: str(value)[:250] for key, value in values.items()})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.journal.sync()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.journal.hurry()
