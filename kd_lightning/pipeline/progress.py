"""Which stage a pipeline is in, and how far."""

import time
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StageProgress(Callback):
    """A bar that names the stage in a terminal; a line for each finished stage anywhere.

    Args:
        console: Where to write.
        stages: How many there will be.
    """

    def __init__(self, console: Console, stages: int) -> None:
        self.console = console
        self.stages = stages
        self._done = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("")
        self._shown = 0.0

    def __enter__(self) -> "StageProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        self._bar.reset(self._task, description=f"[{self._done + 1}/{self.stages}] {name}", total=None)

    def end(self, name: str, what: str) -> None:
        self._done += 1
        self.console.print(f"[{self._done}/{self.stages}] {name}: {what}", markup=False, highlight=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bar.update(self._task, total=trainer.estimated_stepping_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            self._bar.update(self._task, completed=trainer.global_step)
