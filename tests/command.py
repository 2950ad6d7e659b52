"""Run the command line as a user does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

IN_FLOAT = "stages=[teacher,assistants,student,control,distilled,verdict]"
TINY = ["teacher.trainer.max_steps=60", "trainer.max_steps=12", "trainer.log_every_n_steps=2", "seeds=[0]", IN_FLOAT]
"""Little training, but for a teacher well above chance; nothing is quantised."""


def environment(**more: str) -> dict[str, str]:
    # One thread: on a busy machine, threads that wait for each other take many times as long.
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **more}


def kd_lightning(*arguments: str, cwd: Path, code: int = 0, **more: str) -> str:
    """Return what ``kd-lightning`` printed, to both streams; it has to end with ``code``."""
    done = subprocess.run(
        [sys.executable, "-m", "kd_lightning", *arguments],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def copied(folder: Path, to: Path) -> Path:
    """Copy a finished run: its stages are reused, which is faster than to train them again."""
    shutil.copytree(folder / "mlruns", to / "mlruns")
    return to
