"""Whole commands beside a tracking store that dies, hangs, is damaged or locked; and ended by a signal."""

import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from kd_lightning import load_student
from kd_lightning.tracking.journal import history
from kd_lightning.tracking.sync import sync
from tests.command import preloaded
from tests.reliability.preloaded import Command
from tests.shortcuts import MIGRATE
from tests.test_answers import Project, is_asked_for_the_runs
from tests.tracking.servers import Server, failing, free_port, silent

pytestmark = pytest.mark.integration

STAGES = ["seeds=[0]", "stages=[teacher,student]", "models@teacher.network=cnn8"]
SHORT = ["teacher.trainer.max_steps=60", "trainer.max_steps=12", *STAGES]
LONG = ["teacher.trainer.max_steps=60", "trainer.max_steps=500", *STAGES]
INTERRUPTED = "Interrupted. The same command goes on from the last checkpoint."


@pytest.fixture(scope="module")
def server(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), database)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a command in the test's folder, and end what is left of it afterwards."""
    started: list[Command] = []

    def start(*arguments: str, **more: Any) -> Command:
        output = tmp_path / f"printed-{len(started)}.txt"
        started.append(preloaded().start(*arguments, cwd=tmp_path, output=output, **more))
        return started[-1]

    yield start
    for command in started:
        if command.poll() is None:
            command.kill()


def at(server: Server) -> dict[str, str]:
    """The environment of a command that logs there, and gives a busy machine time for the first answer."""
    return {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


def weights(folder: Path, stage: str = "student") -> dict[str, torch.Tensor]:
    (file,) = folder.glob(f"mlruns/stages/{stage}-*/final.ckpt")
    return load_student(file)


def runs(uri: str, name: str) -> list[Any]:
    """The parent of that name and its children, in the order of their creation."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("kd-lightning")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=500)
    (parent,) = [run for run in found if run.info.run_name == name]
    return [parent, *(run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id)]


def statuses(uri: str, name: str) -> list[tuple[str, str]]:
    return [(run.info.run_name, run.info.status) for run in runs(uri, name)]


def assert_curves(uri: str, name: str, folder: Path) -> None:
    """Each stage's numbers are in its journal and in the store, step by step."""
    client = MlflowClient(uri)
    for run in runs(uri, name)[1:]:
        (stage,) = folder.glob(f"mlruns/stages/{run.info.run_name}-*")
        kept = history(stage)
        assert "final/acc" in kept
        for metric, values in kept.items():
            stored = {point.step: point.value for point in client.get_metric_history(run.info.run_id, metric)}
            assert sorted(stored.items()) == values, (run.info.run_name, metric)


def in_fit(folder: Path) -> Callable[[], bool]:
    """Tell whether the student's training has written a checkpoint."""
    return lambda: bool(list(folder.glob("mlruns/stages/student-*/last.ckpt")))


def local(folder: Path, database: Path) -> str:
    (folder / "mlruns").mkdir(exist_ok=True)
    shutil.copy(database, folder / "mlruns/mlflow.db")
    return f"sqlite:///{folder}/mlruns/mlflow.db"


@pytest.mark.parametrize(
    ("where", "what"),
    [("nothing", "connection refused"), ("silent", r"no answer within 4 s"), ("failing", "it answers with error 500")],
)
def test_a_server_that_is_not_there_and_is_required_is_said_before_anything_is_trained(
    start: Callable[..., Command], tmp_path: Path, where: str, what: str
) -> None:
    with silent() as silent_uri, failing() as failing_uri:
        uri = {"nothing": f"http://127.0.0.1:{free_port()}", "silent": silent_uri, "failing": failing_uri}[where]
        command = start(*SHORT, "logger.required=true", MLFLOW_TRACKING_URI=uri.replace("://", "://me:secret@"))
        assert command.wait() == 1
    (line,) = command.printed().strip().splitlines()
    shown = uri.replace("://", "://***@")
    assert line.startswith(f"kd-lightning: the tracking store {shown} cannot be used ({what})")
    assert "logger.required=true" in line
    assert list(tmp_path.glob("mlruns/stages/*/final.ckpt")) == []


def test_a_server_that_is_not_there_is_said_and_a_sync_ships_all_to_another(
    start: Callable[..., Command], database: Path, tmp_path: Path
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    command = start(*SHORT, "name=away", MLFLOW_TRACKING_URI=uri.replace("://", "://me:secret@"))
    assert command.wait() == 0
    printed = command.printed()
    assert "Traceback" not in printed
    assert printed.count("cannot be used (connection refused): the training goes on") == 1
    assert "kd-lightning-sync mlruns/stages ships them, or the same command" in " ".join(printed.split())
    store = local(tmp_path, database)
    assert sync(tmp_path / "mlruns", store)
    names = ("away", "teacher-hard_label-s0", "student-hard_label-s0")
    assert statuses(store, "away") == [(name, "FINISHED") for name in names]
    assert_curves(store, "away", tmp_path)
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.glob("mlruns/stages/*/*.json*"))


def test_a_server_killed_in_fit_changes_no_figure_and_the_same_command_closes_its_runs(
    start: Callable[..., Command], server: Server, tmp_path: Path
) -> None:
    begun = [*LONG, "name=killed"]
    command = start(*begun, **at(server))
    assert command.wait_until(in_fit(tmp_path))
    server.kill()
    assert command.wait() == 0
    printed = command.printed()
    assert "Traceback" not in printed
    assert f"{server.uri} does not take what is logged (connection" in printed
    assert f"were not delivered to {server.uri} (connection refused): what was trained is on the disk" in printed
    alone = start(*LONG, "logger=null", "work_dir=alone")
    assert alone.wait() == 0
    (expected,) = tmp_path.glob("alone/student-*/final.ckpt")
    torch.testing.assert_close(weights(tmp_path), load_student(expected), rtol=0, atol=0)
    server.start()
    assert "RUNNING" in dict(statuses(server.uri, "killed")).values()  # nobody could tell it
    again = start(*begun, **at(server))
    assert again.wait() == 0
    assert again.printed().count("reused") == 2
    found = runs(server.uri, "killed")
    assert [run.info.run_name for run in found] == ["killed", "teacher-hard_label-s0", "student-hard_label-s0"]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert all("final/acc" in run.data.metrics for run in found[1:])
    assert_curves(server.uri, "killed", tmp_path)


def test_a_signal_ends_a_command_whose_server_hangs(
    start: Callable[..., Command], server: Server, tmp_path: Path
) -> None:
    begun = [*LONG, "name=hung"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = start(*begun, **at(server))
        assert command.wait_until(in_fit(tmp_path))
        server.send(signal.SIGSTOP)
        try:
            time.sleep(0.5)  # some requests are under way
            sent = time.monotonic()
            command.send(number)
            if number == signal.SIGINT:
                time.sleep(1)
                command.send(number)  # a user who loses patience
            assert command.wait(60) == code
            assert time.monotonic() - sent < 15  # the attempt to close the runs takes 4 s
        finally:
            server.send(signal.SIGCONT)
        assert INTERRUPTED in command.printed()
        assert "Traceback" not in command.printed()
        assert command.left_behind() == []
    again = start(*begun, **at(server))
    assert again.wait() == 0
    names = ("hung", "teacher-hard_label-s0", "student-hard_label-s0")
    assert statuses(server.uri, "hung") == [(name, "FINISHED") for name in names]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_a_training_closes_the_runs(
    start: Callable[..., Command], database: Path, tmp_path: Path, number: signal.Signals
) -> None:
    uri = local(tmp_path, database)
    arguments = [*SHORT[:3], "stages=[teacher,student,quantized]", "quantized.calibration_samples=6000", "name=ended"]
    command = start(*arguments)

    def quantizing() -> bool:
        return any(file.stat().st_size for file in tmp_path.glob("mlruns/stages/quantized-teacher-ptq*/journal.jsonl"))

    assert command.wait_until(quantizing, 200), command.printed()
    command.send(number)
    assert command.wait(60) == 128 + number
    assert INTERRUPTED in command.printed()
    assert "Traceback" not in command.printed()
    parent, *finished, last = statuses(uri, "ended")
    assert parent == ("ended", "KILLED")
    assert {status for _, status in finished} == {"FINISHED"}
    assert last == ("quantized-teacher-ptq-int8-s0", "KILLED")


def test_a_signal_before_the_first_stage_ends_it_with_the_usual_line(
    start: Callable[..., Command], database: Path, tmp_path: Path
) -> None:
    local(tmp_path, database)
    command = start(*SHORT)
    assert command.wait_until(lambda: (tmp_path / "mlruns/stages").is_dir())
    command.send(signal.SIGTERM)
    assert command.wait(60) == 143
    assert command.printed().strip().splitlines() == [INTERRUPTED]


def test_two_commands_at_once_in_an_empty_folder(start: Callable[..., Command], tmp_path: Path) -> None:
    new = {MIGRATE: "1"}
    commands = [
        start(*SHORT[:2], f"seeds=[{seed}]", "stages=[student]", f"name=both-{seed}", f"work_dir=stages-{seed}", **new)
        for seed in range(2)
    ]
    for command in commands:
        assert command.wait(300) == 0, command.printed()
    for seed in range(2):
        found = statuses(f"sqlite:///{tmp_path}/mlruns/mlflow.db", f"both-{seed}")
        assert {status for _, status in found} == {"FINISHED"}
    assert sorted(path.name for path in (tmp_path / "mlruns").iterdir()) == ["artifacts", "mlflow.db"]


@pytest.mark.parametrize("how", ["torn", "overwritten", "locked and required"])
def test_a_damaged_or_locked_database_is_named(
    start: Callable[..., Command], database: Path, tmp_path: Path, how: str
) -> None:
    local(tmp_path, database)
    file = tmp_path / "mlruns/mlflow.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        if how == "torn":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif how == "overwritten":
            file.write_bytes(b"not a database" * 1000)
        else:
            other.execute("BEGIN EXCLUSIVE")
        command = start(*SHORT, *(["logger.required=true"] if how == "locked and required" else []))
        assert command.wait() == 1
    (line,) = command.printed().strip().splitlines()
    assert str(file) in line
    assert ("is damaged (" if how in ("torn", "overwritten") else "is locked by another process") in line
    assert "SQL:" not in line
    assert list(tmp_path.glob("mlruns/stages/*/final.ckpt")) == []


def test_a_locked_database_is_waited_for_in_the_background(
    start: Callable[..., Command], database: Path, tmp_path: Path
) -> None:
    uri = local(tmp_path, database)
    with closing(sqlite3.connect(tmp_path / "mlruns/mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        command = start(*SHORT, "name=locked")
        assert command.wait_until(lambda: list(tmp_path.glob("mlruns/stages/teacher-*/journal.jsonl")))
        other.execute("ROLLBACK")
    assert command.wait() == 0
    assert command.printed().count("is locked by another process") == 1
    assert {status for _, status in statuses(uri, "locked")} == {"FINISHED"}
    assert_curves(uri, "locked", tmp_path)


def test_a_disk_that_fills_in_training_ends_in_one_line(
    start: Callable[..., Command], database: Path, tmp_path: Path
) -> None:
    small = tmp_path / "mlruns"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copy(database, small / "mlflow.db")
        command = start(*LONG, "name=full")
        assert command.wait_until(in_fit(tmp_path))
        with (small / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(1 << 16))
        code = command.wait(120)
        printed = command.printed()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert code == 1, printed
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("kd-lightning: ")
    assert "No space left on device" in last
    journal_or_store = r"(journal\.jsonl cannot be written|sqlite:///mlruns/mlflow\.db does not take what is logged) "
    assert re.search(
        journal_or_store + r"\((No space left on device|database or disk is full)\); the training", printed
    )


def test_a_server_is_asked_for_the_runs_of_an_answer(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked_for_the_runs(Project(tmp_path, monkeypatch), server.uri)
