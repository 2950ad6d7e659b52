"""What a person reads in the terminal: which stage a pipeline is in, and the verdict."""

import textwrap
import time
from types import TracebackType
from typing import Any

import rich.table
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from kd_lightning.progress import progress
from kd_lightning.records import Verdict
from kd_lightning.report.table import Table, comparison, overview
from kd_lightning.report.words import say


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Print the tables, which fit 80 columns; then the sentence, the findings and the warnings."""
    for table in (overview(verdict), comparison(verdict)):
        if table is not None:
            console.print(_in_rich(table))
            if table.note:
                console.print(Text(table.note, style="dim"))
            console.print()
    words = say(verdict)
    lines = [words.sentence, *(f"- {said}" for said in words.findings), *(f"Beware: {said}" for said in words.warnings)]
    for line in lines:
        indent = "  " if line.startswith("- ") else ""
        console.print(Text(textwrap.fill(line, console.width, subsequent_indent=indent, break_on_hyphens=False)))


def _in_rich(table: Table) -> rich.table.Table:
    """Lay out a table whose numbers stay on one line: titles are wrapped to their width, names where there is need."""
    laid_out = rich.table.Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    laid_out.add_column("")
    for i, column in enumerate(table.columns[1:], start=1):
        width = max(len(row[i]) for row in table.rows)
        wrapped = textwrap.wrap(column, max(width, 9), break_long_words=False, break_on_hyphens=False)
        laid_out.add_column(Text("\n".join(wrapped)), justify="right", no_wrap=True)
    for row in table.rows:
        laid_out.add_row(*map(Text, row))
    return laid_out


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
