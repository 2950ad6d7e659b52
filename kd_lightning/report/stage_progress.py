"""What a person sees of a pipeline that is under way: which stage it is in, and how long it will take."""

import time
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kd_lightning.progress import progress


class StageProgress(Callback):
    """One line in a terminal: the stage, how much of the whole pipeline is done, and the time that is left.

    A line for each finished stage anywhere. Stages count alike, whatever they take; the time left follows from how
    fast the last half minute went.

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
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=stages)
        self._shown = 0.0

    def __enter__(self) -> "StageProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        self._bar.update(self._task, description=f"[{self._done + 1}/{self.stages}] {name}", completed=self._done)

    def end(self, name: str, what: str) -> None:
        self._done += 1
        self.console.print(f"[{self._done}/{self.stages}] {name}: {what}", markup=False, highlight=False)
        self._bar.update(self._task, completed=self._done)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            self._bar.update(self._task, completed=self._done + progress(trainer))
