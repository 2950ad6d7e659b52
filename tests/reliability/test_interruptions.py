"""Killed or stopped anywhere: the same command again gives the same figures, and nothing is left behind."""

import hashlib
import json
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kd_lightning import load_student
from tests.command import preloaded
from tests.pipeline.test_pipeline import runs
from tests.reliability.preloaded import Command
from tests.shortcuts import FEW_SAMPLES, MIGRATE

pytestmark = pytest.mark.integration

ARGUMENTS = [
    "models@teacher.network=cnn8",
    "teacher.trainer.max_steps=60",
    "trainer.max_steps=12",
    "trainer.log_every_n_steps=2",
    "quantized.steps=6",
    "quantized.weights_only=null",
    "quantized.calibration_samples=64",
    "seeds=[0]",
    "teachers=stored",
    "stages=[teacher,store_outputs,student,control,distilled,quantized,verdict]",
]
FIRST_FILES = {  # what a stage has written when it is under way
    "teacher": "teacher-*/journal.jsonl",
    "store_outputs": "outputs-*",
    "student": "student-*/journal.jsonl",
    "control": "control-*/journal.jsonl",
    "distilled": "distilled-*/journal.jsonl",
    "quantized, no training": "quantized-teacher-*/journal.jsonl",
    "quantized, trained": "quantized-distilled-qat-*/journal.jsonl",
    "verdict": "quantized-distilled-qat-*/result.json",
}
KILLS = 20


def start(folder: Path, output: str = "output", **more: str) -> Command:
    return preloaded().start(*ARGUMENTS, cwd=folder, output=folder / output, **{FEW_SAMPLES: "1"}, **more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = start(folder)
    assert command.wait() == 0, command.printed()
    found = figures(folder)
    assert len(found) == 9 + 2  # stages; the verdict and its rows
    return found


def figures(folder: Path) -> dict[str, object]:
    """Return what decides: each stage's weights and predictions, bit by bit, and the verdict but for what it timed."""
    found: dict[str, object] = {}
    for stage in folder.glob("mlruns/stages/*/final.ckpt"):
        name = stage.parent.name.rsplit("-", 1)[0]
        weights = b"".join(value.numpy().tobytes() for value in load_student(stage).values())
        with np.load(stage.parent / "predictions.npz") as arrays:
            content = weights + b"".join(arrays[key].tobytes() for key in sorted(arrays))
        found[name] = hashlib.sha256(content).hexdigest()
    (verdict,) = folder.glob("mlruns/stages/pipeline-*/verdict.json")
    content = json.loads(verdict.read_text())
    rows = ("accuracy", "agreement", "retention", "gap_closed", "params")
    found["verdict"] = {key: content[key] for key in ("worth_it", "gap_closed", "differences")}
    found["rows"] = {key: {row: model.get(row) for row in rows} for key, model in content["models"].items()}
    return found


def assert_whole(folder: Path, command: Command, uninterrupted: dict[str, object]) -> None:
    """The promise: the same figures, no file, run or process left behind."""
    assert figures(folder) == uninterrupted
    left = [file.name for file in folder.rglob("*") if ".probe" in file.name or file.name.endswith(".tmp")]
    assert not left
    assert not list(folder.glob("mlruns/stages/*/last.ckpt"))
    _, parents, children = runs(folder)
    assert {run.info.status for run in (*parents, *children)} <= {"FINISHED", "KILLED", "FAILED"}
    assert parents[-1].info.status == "FINISHED"
    assert command.left_behind() == []


def written(folder: Path) -> set[tuple[str, int]]:
    """Return what stands in the stages' folders, and since when."""
    found = set()
    for file in folder.glob("mlruns/stages/**/*"):
        with suppress(FileNotFoundError):
            found.add((str(file), file.stat().st_mtime_ns))
    return found


def test_killed_at_twenty_random_points(uninterrupted: dict[str, object], tmp_path: Path) -> None:
    chance, kills, attempt = random.Random(0), 0, 0
    while kills < KILLS:
        attempt += 1
        folder = tmp_path / str(attempt)
        folder.mkdir()
        finished = False
        while not finished:
            before = written(folder)
            command = start(folder, **{MIGRATE: "1"})
            if kills < KILLS:
                more = chance.choice([0, *range(1, 8)])  # files; 0 is a point in the start
                finished = not command.wait_until(lambda: len(written(folder) - before) >= more)  # noqa: B023
                time.sleep(chance.uniform(0, 2.0 if more == 0 else 0.2))
            if not finished and kills < KILLS and command.poll() is None:
                command.kill()
                assert command.wait() == -signal.SIGKILL
                kills += 1
            else:
                assert command.wait() == 0, command.printed()
                finished = True
        assert_whole(folder, command, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_each_stage(
    uninterrupted: dict[str, object], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    for stage, file in FIRST_FILES.items():
        command = start(tmp_path)
        assert command.wait_until(lambda: any(tmp_path.glob(f"mlruns/stages/{file}"))), f"ended before {stage}"  # noqa: B023
        command.send(number)
        assert command.wait(100) == code, f"{stage}: {command.printed()}"
        assert "The same command goes on from the last checkpoint" in command.printed(), stage
        assert "Traceback" not in command.printed(), stage
        assert command.left_behind() == [], stage
        _, parents, children = runs(tmp_path)
        assert {run.info.status for run in (*parents, *children)} <= {"FINISHED", "KILLED"}, stage
    command = start(tmp_path)
    assert command.wait() == 0, command.printed()
    assert_whole(tmp_path, command, uninterrupted)


def test_two_equal_commands_at_once_train_once(uninterrupted: dict[str, object], tmp_path: Path) -> None:
    commands = [start(tmp_path, f"output-{i}") for i in range(2)]
    for command in commands:
        assert command.wait() == 0, command.printed()
    for command in commands:
        assert_whole(tmp_path, command, uninterrupted)
    lines = [line for command in commands for line in command.printed().splitlines() if line.startswith("[")]
    trained = [line.split("] ")[1].split(":")[0] for line in lines if "reused" not in line]
    assert len(trained) == len(set(trained)) == len(lines) / 2
    client, _, children = runs(tmp_path)
    for run in children:
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert len({point.step for point in history}) == len(history), f"{run.info.run_name} was logged to twice"
