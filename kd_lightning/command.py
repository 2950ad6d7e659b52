"""What the command does once its configuration is there."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from kd_lightning.answers import Question
from kd_lightning.configuration.arguments import in_a_line
from kd_lightning.configuration.assembling import pipeline
from kd_lightning.report.verdict_json import text_of
from kd_lightning.report.words import say

_MISTAKES = (ValueError, TypeError, OSError, ImportError, FloatingPointError, OmegaConfBaseException)
"""What a user can have caused: said in a line, with HYDRA_FULL_ERROR=1 as a traceback."""


def run(
    config: DictConfig,
    base: str | None,
    overrides: Sequence[str],
    sweep: tuple[Path, Sequence[str]] | None = None,
    *,
    asked: Question | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> float | None:
    """Run a pipeline, and say what came of it.

    Args:
        config: As it was composed.
        base: Experiment or data, with which the pipeline's name begins, unless the configuration has a name.
        overrides: With which it was composed.
        sweep: Of which it is a job: its folder, and the overrides that differ between its jobs.
        asked: What a later command is answered by.
        quiet: Print the sentence alone.
        as_json: Print ``verdict.json`` alone.

    Returns:
        What a Hydra sweeper optimises; None without a verdict.
    """
    try:
        job = pipeline(config, base, overrides, sweep)
        job.asked = asked
        if quiet or as_json:
            job.console = Console(quiet=True)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # libraries print there, too
            verdict = job.run()
    except Exception as error:
        of_tracking = type(error).__module__.startswith("mlflow")  # which is not imported for this alone
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not (of_tracking or isinstance(error, _MISTAKES)):
            raise
        raise SystemExit(f"kd-lightning: {'logger: ' if of_tracking else ''}{in_a_line(error)}") from error
    if verdict is None:
        return None
    if as_json:
        print(text_of(verdict))
    elif quiet:
        print(say(verdict).sentence)
    return verdict.objective
