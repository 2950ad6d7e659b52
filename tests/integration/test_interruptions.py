"""A training that is interrupted, whatever by, loses nothing that was said to be saved."""

import signal
from pathlib import Path

import pytest
import torch

from kd_lightning import load_student
from tests.command import kd_lightning, preloaded
from tests.pipeline.test_pipeline import runs

pytestmark = pytest.mark.integration

STEPS = 500
ARGUMENTS = ["teacher.trainer.max_steps=60", f"trainer.max_steps={STEPS}", "seeds=[0]", "stages=[teacher,student]"]
ARGUMENTS += ["models@teacher.network=cnn8"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    kd_lightning(*ARGUMENTS, "logger=null", cwd=folder)
    return weights(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("mlruns/stages/student-*/final.ckpt")
    return load_student(file)


def interrupt(folder: Path) -> int:
    """Start, and kill once the student's training has written its second checkpoint."""
    command = preloaded().start(*ARGUMENTS, cwd=folder, output=folder / "printed")
    written: set[int] = set()

    def twice() -> bool:
        written.update(file.stat().st_mtime_ns for file in folder.glob("mlruns/stages/student-*/last.ckpt"))
        return len(written) == 2

    assert command.wait_until(twice, 200), "it ended before the signal"
    command.kill()
    return command.wait(100)


def test_the_same_command_goes_on_from_the_middle_of_a_training_and_gives_the_same_weights(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Ctrl-C and SIGTERM in each stage: tests/reliability."""
    assert interrupt(tmp_path) == -signal.SIGKILL
    assert not list(tmp_path.glob("mlruns/stages/student-*/final.ckpt"))
    (last,) = tmp_path.glob("mlruns/stages/student-*/last.ckpt")
    assert 0 < torch.load(last, weights_only=True)["global_step"] < STEPS
    printed = kd_lightning(*ARGUMENTS, cwd=tmp_path)
    assert printed.count("reused") == 1
    torch.testing.assert_close(weights(tmp_path), uninterrupted, rtol=0, atol=0)
    _, parents, children = runs(tmp_path)  # gone on with in the runs that were begun
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert [run.info.run_name for run in children] == ["teacher-hard_label-s0", "student-hard_label-s0"]
    assert {run.info.status for run in children} == {"FINISHED"}


def test_a_torn_checkpoint_is_named_and_the_training_starts_again(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    interrupt(tmp_path)
    (last,) = tmp_path.glob("mlruns/stages/student-*/last.ckpt")
    last.write_bytes(last.read_bytes()[:500])
    printed = kd_lightning(*ARGUMENTS, cwd=tmp_path)
    assert "last.ckpt cannot be read as a checkpoint" in printed
    torch.testing.assert_close(weights(tmp_path), uninterrupted, rtol=0, atol=0)
