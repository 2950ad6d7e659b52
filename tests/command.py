"""Run the command line as a user does."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.reliability.preloaded import Preloaded

IN_FLOAT = "stages=[teacher,assistants,student,control,distilled,verdict]"
TINY = ["teacher.trainer.max_steps=60", "trainer.max_steps=12", "trainer.log_every_n_steps=2", "seeds=[0]", IN_FLOAT]
"""Little training, but for a teacher well above chance; nothing is quantised."""


def environment(**more: str) -> dict[str, str]:
    # One thread: on a busy machine, threads that wait for each other take many times as long.
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **more}


@cache
def preloaded() -> "Preloaded":
    """Return this process's parent of commands, which imports everything once; it ends with this process."""
    from tests.reliability.preloaded import Preloaded

    started = Preloaded().__enter__()
    atexit.register(started.__exit__, None, None, None)
    return started


def kd_lightning(*arguments: str, cwd: Path, code: int = 0, **more: str) -> str:
    """Return what ``kd-lightning`` printed, to both streams; it has to end with ``code``.

    The command is a process of its own, and on Linux starts in a hundredth of a second.
    """
    if sys.platform != "linux":
        return kd_lightning_anew(*arguments, cwd=cwd, code=code, **more)
    with tempfile.NamedTemporaryFile() as file:
        output = Path(file.name)
        return preloaded().run(*arguments, cwd=cwd, output=output, code=code, seconds=300, **more)


def kd_lightning_anew(*arguments: str, cwd: Path, code: int = 0, **more: str) -> str:
    """Return the same of a new interpreter, where a command starts others like itself or imports from elsewhere."""
    command = [sys.executable, "-m", "kd_lightning", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=cwd, env=environment(**more), timeout=300, check=False, **streams)
    assert done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def copied(folder: Path, to: Path) -> Path:
    """Copy a finished run: its stages are reused, which is faster than to train them again."""
    shutil.copytree(folder / "mlruns", to / "mlruns")
    return to
