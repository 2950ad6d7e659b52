"""A finished stage is used again as it was written; anything else is named, and runs again."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from kd_lightning import load_student
from kd_lightning.durable_files import seal, unseal
from kd_lightning.pipeline import run as run_module
from kd_lightning.pipeline.folder import FinishedStage, StageFolder
from tests.pipeline.tiny_training import made, training

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")
FILES = ("result.json", "final.ckpt", "predictions.npz")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> FinishedStage:
    return made(tmp_path_factory.mktemp("teacher"), "teacher")


@pytest.fixture
def stage(tmp_path: Path) -> FinishedStage:
    return made(tmp_path, "student")


def contents(stage: FinishedStage) -> dict[str, bytes]:
    """All files, but for the seconds in ``result.json``."""
    found = {file.name: file.read_bytes() for file in sorted(stage.folder.path.iterdir())}
    result = unseal(found["result.json"])
    result["result"]["figures"]["train_seconds"] = 0.0
    found["result.json"] = seal(result).encode()
    return found


def flips(path: Path, count: int) -> list[tuple[int, int]]:
    """Positions all over a file, its first and last bytes among them, and a bit of each."""
    last = path.stat().st_size - 1
    return [(round(i * last / (count - 1)), i % 8) for i in range(count)]


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_it_is_used_again(stage, tmp_path) -> None:
    again = made(tmp_path, "student")
    assert (stage.reused, again.reused) == (False, True)
    assert np.array_equal(again.result.answers, stage.result.answers)
    assert np.array_equal(again.result.scores, stage.result.scores)
    assert again.result.to_dict() == stage.result.to_dict()
    assert {file.name for file in stage.folder.path.iterdir()} == {*FILES, "example.npz", "lock"}


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_named(stage, caplog, name: str) -> None:
    file = stage.folder.path / name
    whole = file.read_bytes()
    for position, bit in flips(file, 60):
        flip(file, position, bit)
        if name == "result.json" and unsealed(file) == unseal(whole):
            continue  # white space
        caplog.clear()
        assert stage.folder.result() is None, f"bit {bit} of byte {position}"
        assert f"{stage.folder.path} is damaged: {name}" in caplog.text
        assert caplog.text.count("\n") == 1
        file.write_bytes(whole)
    assert stage.folder.result() is not None


def unsealed(file: Path) -> dict | None:
    try:
        return unseal(file.read_bytes())
    except ValueError:
        return None


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def filled_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: list[Callable[[Path], None]] = [torn, emptied, filled_with_zeros, Path.unlink]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_after_any_damage_the_stage_runs_again_and_is_the_same(stage, tmp_path, caplog, name: str, damage) -> None:
    before = contents(stage)
    damage(stage.folder.path / name)
    again = made(tmp_path, "student")
    assert not again.reused
    assert contents(again) == before
    if not (name == "result.json" and damage is Path.unlink):  # then it never was finished
        assert "is damaged" in caplog.text
        assert name in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_stage_is_none_of_this(stage, tmp_path, caplog, name: str) -> None:
    """One of the same network, which fits in every way."""
    before = contents(stage)
    other = made(tmp_path, "student", seed=1)
    (stage.folder.path / name).write_bytes((other.folder.path / name).read_bytes())
    again = made(tmp_path, "student")
    assert not again.reused
    assert contents(again) == before
    assert f"{stage.folder.path} is damaged: {name}" in caplog.text


def test_a_headline_that_does_not_follow_from_the_scores_is_named(stage, caplog) -> None:
    """Not by a fault, but by a program that wrote both."""
    file = stage.folder.path / "result.json"
    content = unseal(file.read_bytes())
    content["result"]["headline"] = 0.99
    file.write_text(seal(content))
    assert stage.folder.result() is None
    assert "on the test images, expected 0.99 as result.json says" in caplog.text


def test_a_students_stage_depends_on_its_teachers_weights(teacher, tmp_path) -> None:
    """A teacher that is trained again may come out otherwise, on a GPU for one."""
    one = made(tmp_path, "distilled", teacher)
    assert made(tmp_path, "distilled", teacher).reused
    state = load_student(teacher.folder.weights)
    whole = {file.name: file.read_bytes() for file in teacher.folder.path.iterdir()}
    network = teacher.network()
    state["head.bias"] += 0.5
    network.load_state_dict(state)
    teacher.folder.finish(network, teacher.result)
    other = made(tmp_path, "distilled", teacher)
    for name, content in whole.items():
        (teacher.folder.path / name).write_bytes(content)
    assert not other.reused
    assert other.folder.path != one.folder.path
    assert not torch.equal(
        load_student(other.folder.weights)["head.bias"], load_student(one.folder.weights)["head.bias"]
    )


class Interrupts(Callback):
    """Ends a training after its first epoch, when that has left a checkpoint."""

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


class Watches(Callback):
    def __init__(self) -> None:
        self.began: list[int] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.began.append(trainer.current_epoch)


@pytest.fixture
def interrupt(tmp_path: Path, monkeypatch) -> Callable[..., StageFolder]:
    """Begin a stage in ``tmp_path/again``; its folder then has a checkpoint from after the first epoch."""
    monkeypatch.setattr(run_module, "_STEPS_BETWEEN_CHECKPOINTS", 4)  # an epoch's

    def begin(seed: int = 0) -> StageFolder:
        stages = tmp_path / "again"
        with pytest.raises(KeyboardInterrupt):
            made(stages, "student", seed=seed, callbacks=lambda: [Interrupts()])
        (checkpoint,) = stages.glob(f"student-hard_label-s{seed}-*/last.ckpt")
        content = torch.load(checkpoint, weights_only=True)
        return StageFolder(stages, training(seed=seed), content["callbacks"]["StageMark"]["fingerprint"])

    return begin


@pytest.fixture
def straight(tmp_path: Path) -> FinishedStage:
    """The same stage, not interrupted."""
    return made(tmp_path / "straight", "student", callbacks=lambda: [])


def gone_on_with(folder: StageFolder) -> tuple[FinishedStage, list[int]]:
    """Make the stage again; tell in which epoch its training began."""
    watches = Watches()
    again = made(folder.path.parent, "student", callbacks=lambda: [watches])
    assert again.folder.path == folder.path
    return again, watches.began


def test_a_training_goes_on_from_its_checkpoint(straight, interrupt) -> None:
    again, began = gone_on_with(interrupt())
    assert began == [1]
    assert contents(again) == contents(straight)  # the very bytes: later stages do not depend on how it came about


def test_a_damaged_checkpoint_is_named_and_the_training_starts_again(straight, interrupt, caplog) -> None:
    folder = interrupt()
    checkpoint = folder.path / "last.ckpt"
    whole, expected = checkpoint.read_bytes(), load_student(checkpoint)
    refused = 0
    for position, bit in flips(checkpoint, 60):
        flip(checkpoint, position, bit)
        caplog.clear()
        if folder.last_checkpoint() is None:
            refused += 1
            assert f"{checkpoint} " in caplog.text
            assert "; the training starts again" in caplog.text
        else:  # in what fills up the file
            torch.testing.assert_close(load_student(checkpoint), expected, rtol=0, atol=0)
        checkpoint.write_bytes(whole)
    assert refused > 20
    torn(checkpoint)
    again, began = gone_on_with(folder)
    assert began == [0]
    assert contents(again) == contents(straight)


def test_a_checkpoint_of_another_stage_is_none_of_this(straight, interrupt, caplog) -> None:
    folder, other = interrupt(), interrupt(seed=1)
    (folder.path / "last.ckpt").write_bytes((other.path / "last.ckpt").read_bytes())
    again, began = gone_on_with(folder)
    assert began == [0]
    assert "last.ckpt is of another stage; the training starts again" in caplog.text
    assert contents(again) == contents(straight)


def test_a_checkpoint_is_written_beside_its_place(interrupt, monkeypatch) -> None:
    """In the system's temporary folder a killed process would leave it."""
    monkeypatch.setattr(tempfile, "mkstemp", lambda *_, **__: pytest.fail("a file was made elsewhere"))
    interrupt()


def test_an_exported_file_counts_once_it_is_recorded(stage, caplog) -> None:
    file = stage.folder.file
    assert not stage.folder.has_file()
    file.write_bytes(b"network")
    assert not stage.folder.has_file()  # the process was killed before it said so
    stage.folder.record_file()
    assert stage.folder.has_file()
    assert stage.folder.result() is not None
    assert caplog.text == ""
    file.write_bytes(b"Network")
    assert not stage.folder.has_file()
    assert "model.onnx is damaged: model.onnx has other bytes than were written" in caplog.text
    assert stage.folder.result() is None


def test_predictions_are_read_without_pickle(stage) -> None:
    with np.load(stage.folder.path / "predictions.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"answers", "scores"}
