"""Two processes that want the same stage: one makes it, the other waits and uses it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_lightning.pipeline.folder import held, held_if_free
from tests.command import environment

ROOT = Path(__file__).parents[2]
HOLDS = """
import pathlib, sys
from kd_lightning.pipeline.folder import held

with held(pathlib.Path(sys.argv[1]), "the stage"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.integration
def test_a_process_waits_for_another_and_says_for_which(tmp_path: Path) -> None:
    first = holder(tmp_path)
    second = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = second.stderr.readline()
    assert f"the stage is under way in process {first.pid} on " in said
    with held_if_free(tmp_path) as alone:
        assert not alone
    first.communicate("\n", timeout=30)
    assert second.stdout.readline() == "held\n"
    second.communicate("\n", timeout=30)
    with held_if_free(tmp_path) as alone:
        assert alone
    assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.integration
def test_a_killed_process_holds_nothing_and_one_that_waits_can_be_interrupted(tmp_path: Path) -> None:
    first = holder(tmp_path)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held(tmp_path, "the stage"):
        pass
    assert time.monotonic() - start < 5
    first.kill()
    first.wait()
    with held(tmp_path, "the stage"):
        pass
    assert os.listdir(tmp_path) == ["lock"]
