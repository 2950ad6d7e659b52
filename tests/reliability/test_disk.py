"""Whole commands, and what is on disk: damaged, shared with another command, or left by one that was killed."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd_lightning.durable_files import unseal
from kd_lightning.pipeline.folder import held
from tests.command import IN_FLOAT, copied, preloaded
from tests.pipeline.test_pipeline import runs
from tests.reliability.preloaded import Command, Preloaded
from tests.shortcuts import FEW_SAMPLES

pytestmark = pytest.mark.integration

SMALL = ["teacher.trainer.max_steps=40", "trainer.max_steps=12", "trainer.log_every_n_steps=2", "seeds=[0]"]
SMALL += ["models@teacher.network=cnn8"]
ROWS = [*SMALL, "quantized.steps=8", "quantized.calibration_samples=64"]


@pytest.fixture(scope="module")
def commands() -> Iterator[Preloaded]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(FEW_SAMPLES, "1")
        yield preloaded()


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory) -> Path:
    """A finished pipeline with every kind of file: stored outputs, quantised students, files in fp32, a verdict."""
    folder = tmp_path_factory.mktemp("whole")
    stages = "stages=[teacher,student,store_outputs,distilled,quantized,verdict]"
    commands.run(*ROWS, stages, cwd=folder, output=folder / "printed")
    return folder


def figures(folder: Path) -> dict[str, object]:
    """All that is no time: what is in the results, the hashes of the files they vouch for, the verdict's accuracies."""
    found: dict[str, object] = {}
    for file in folder.glob("mlruns/stages/*/result.json"):
        content = unseal(file.read_bytes())
        del content["result"]["figures"]["train_seconds"]
        found[file.parent.name] = content
    (verdict,) = folder.glob("mlruns/stages/pipeline-*/verdict.json")
    models = json.loads(verdict.read_text())["models"]
    return found | {label: [model["accuracy"], model["agreement"]] for label, model in models.items()}


def torn(file: Path) -> None:
    os.truncate(file, 2 * file.stat().st_size // 3)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def anothers(file: Path) -> None:
    """Put the file of another stage in its place."""
    others = [other for other in sorted(file.parents[1].glob(f"*/{file.name}")) if other.parent != file.parent]
    file.write_bytes(others[-1].read_bytes())


@pytest.mark.parametrize(
    ("damage", "kind", "then"),  # each damage to each kind of file: in pipeline/test_folder.py, without a command
    [
        (torn, "student-*/result.json", "the stage runs again"),
        (flipped, "student-*/final.ckpt", "the stage runs again"),
        (anothers, "distilled-*/final.ckpt", "the stage runs again"),
        (anothers, "distilled-*/predictions.npz", "the stage runs again"),
        (flipped, "teacher-*/predictions.npz", "the stage runs again"),
        (torn, "quantized-student-ptq-*/model.onnx", "the stage runs again"),
        (flipped, "teacher-*/model.onnx", "the stage runs again"),
        (anothers, "student-*/journal.jsonl", "a new run is begun"),
        (torn, "outputs-*/manifest.json", "written anew"),
        (flipped, "outputs-*/shards/000000.logits.npy", "written anew"),
        (torn, "pipeline-*/verdict.json", None),  # written by each command
    ],
)
def test_a_damaged_file_is_named_and_the_figures_are_the_same(
    commands, whole, tmp_path, damage, kind: str, then: str | None
) -> None:
    folder = copied(whole, tmp_path)
    (file,) = folder.glob(f"mlruns/stages/{kind}")
    damage(file)
    stages = "stages=[teacher,student,store_outputs,distilled,quantized,verdict]"
    printed = commands.run(*ROWS, stages, cwd=folder, output=tmp_path / "printed")
    if then is not None:
        (line,) = [line for line in printed.splitlines() if then in line]
        assert file.name in line
        assert str(file.parent.relative_to(folder)) in line or str(file.parents[1].relative_to(folder)) in line
    assert "Traceback" not in printed
    assert figures(folder) == figures(whole)


def waits_for(command: Command, process: int) -> bool:
    line = f"the stage teacher-hard_label-s0 is under way in process {process} on"
    return command.wait_until(lambda: line in " ".join(command.printed().split()))


def test_two_equal_commands_train_everything_once(commands, whole, tmp_path) -> None:
    (teacher,) = whole.glob("mlruns/stages/teacher-*")  # the stage that these commands begin with
    with held(tmp_path / "mlruns" / "stages" / teacher.name, "the test"):
        first = commands.start(*SMALL, IN_FLOAT, cwd=tmp_path, output=tmp_path / "first")
        assert waits_for(first, os.getpid())
        second = commands.start(*SMALL, IN_FLOAT, cwd=tmp_path, output=tmp_path / "second")
        assert waits_for(second, os.getpid())
    assert (first.wait(300), second.wait(300)) == (0, 0)
    assert (first.printed() + second.printed()).count("s of training)") == 4
    client, parents, children = runs(tmp_path)
    assert len(parents) == 2
    assert {run.info.status for run in (*parents, *children)} == {"FINISHED"}
    for run in children:  # no step was logged twice
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert len({point.step for point in history}) == len(history)
    assert accuracies(first.printed()) == accuracies(second.printed())


def accuracies(printed: str) -> list[str]:
    return re.findall(r"s0: validation accuracy ([\d.]+ %)", printed)


def test_two_sweeps_share_the_teacher(commands, tmp_path) -> None:
    stages = ["stages=[teacher,distilled]", "logger=null"]
    one = commands.start("-m", *SMALL, *stages, "losses.kd.temperature=2,4", cwd=tmp_path, output=tmp_path / "one")
    other = commands.start("-m", *SMALL, *stages, "losses.kd.temperature=4,8", cwd=tmp_path, output=tmp_path / "other")
    assert (one.wait(300), other.wait(300)) == (0, 0)
    printed = one.printed() + other.printed()
    assert printed.count("s of training)") == 4  # the teacher, and three temperatures
    assert printed.count("reused") == 4
    assert len(list(tmp_path.glob("mlruns/stages/teacher-*"))) == 1


def test_a_command_that_waits_can_be_interrupted_and_a_killed_one_is_not_waited_for(commands, tmp_path) -> None:
    arguments = [*SMALL, "stages=[teacher]", "logger=null", "teacher.trainer.max_steps=100000"]
    first = commands.start(*arguments, cwd=tmp_path, output=tmp_path / "first")
    assert first.wait_until(lambda: list(tmp_path.glob("mlruns/stages/teacher-*/last.ckpt")))
    second = commands.start(*arguments, cwd=tmp_path, output=tmp_path / "second")
    assert waits_for(second, first.pid)
    second.send(signal.SIGINT)
    assert second.wait(20) == 130
    assert "Interrupted. The same command goes on" in second.printed()
    first.kill()
    assert first.wait(20) == -signal.SIGKILL
    third = commands.start(*arguments, cwd=tmp_path, output=tmp_path / "third")
    checkpoint = next(tmp_path.glob("mlruns/stages/teacher-*/last.ckpt"))
    before = checkpoint.stat().st_mtime_ns
    assert third.wait_until(lambda: checkpoint.stat().st_mtime_ns != before)
    assert "is under way" not in third.printed()
    third.kill()


def test_what_killed_commands_have_left_is_gone_after_the_next(commands, whole, tmp_path) -> None:
    folder = copied(whole, tmp_path)
    (stage,) = folder.glob("mlruns/stages/student-*")
    dead = commands.start("--version-of-nothing", cwd=folder, output=tmp_path / "dead")
    dead.wait()
    suffix = f"{dead.pid}@{socket.gethostname()}.tmp"
    for path in (folder / "mlruns" / "stages", folder / "mlruns", stage):
        (path / f".probe.{suffix}").write_bytes(bytes(10))
    (stage / f".model.onnx.x.{suffix}").mkdir()
    stages = "stages=[teacher,student,store_outputs,distilled,quantized,verdict]"
    commands.run(*ROWS, stages, cwd=folder, output=tmp_path / "printed")
    assert not list((folder / "mlruns").rglob("*.tmp"))


LOSS = "from own_parts import distance\nfrom kd_lightning.losses import DistillationLoss\n\n\n"
LOSS += "class L1(DistillationLoss):\n"
LOSS += "    def forward(self, student, teacher, target):\n"
LOSS += "        return distance(student.logits, teacher.logits)  # of the logits\n"
PARTS = "def distance(a, b):\n    return 0.1 * (a - b).abs().mean()\n"


def test_an_edited_loss_of_ones_own_is_trained_with(commands, whole, tmp_path) -> None:
    folder = copied(whole, tmp_path)
    (folder / "own_loss.py").write_text(LOSS)
    (folder / "own_parts.py").write_text(PARTS)
    arguments = [*SMALL, "stages=[teacher,distilled]", "logger=null", "+losses.l1._target_=own_loss.L1"]

    def trained() -> int:
        printed = commands.run(*arguments, cwd=folder, output=tmp_path / "printed")  # finds modules there
        assert printed.count("reused") >= 1  # the teacher, which has nothing to do with it
        return printed.count("s of training)")

    assert (trained(), trained()) == (1, 0)
    (folder / "own_loss.py").write_text(LOSS.replace("# of the logits", "# mean over batch and classes"))
    assert trained() == 0
    (folder / "own_parts.py").write_text(PARTS.replace("0.1", "0.2"))
    assert trained() == 1
    (folder / "own_loss.py").write_text(LOSS.replace("student.logits,", "2 * student.logits,"))
    assert trained() == 1
    (folder / "own_loss.py").write_text(LOSS)
    (folder / "own_parts.py").write_text(PARTS)
    assert trained() == 0  # it is the first one again
