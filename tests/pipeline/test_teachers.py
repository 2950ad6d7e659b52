"""Each source of a teacher's outputs, chosen on the command line."""

import re
import shutil
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException, MissingConfigException

from kd_lightning import load_student
from kd_lightning.cli import conf_dir
from kd_lightning.configuration.assembling import pipeline
from kd_lightning.models import CNN8, MLP32
from kd_lightning.pipeline.pipeline import Pipeline
from tests.command import TINY, copied, kd_lightning
from tests.pipeline.test_pipeline import runs

DATA = """
import torch
from torch.utils.data import Dataset
from kd_lightning.data import FashionMNIST

class Logits(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        image, label = self.dataset[key]
        return image, label, 5.0 * torch.nn.functional.one_hot(label, 10)

class Answered(FashionMNIST):
    def setup(self, stage="fit"):
        super().setup(stage)
        if self.role in ("control", "distilled"):
            self.wrappers = [Logits]
"""


def predictions(folder: Path, name: str) -> np.ndarray:
    (file,) = folder.glob(f"mlruns/stages/{name}-????????????/predictions.npz")
    return np.load(file)["answers"]


def job(*overrides: str) -> Pipeline:
    """The command line's pipeline, in this process and without a logger."""
    given = [*TINY, "logger=null", *overrides]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return pipeline(hydra.compose("config", given), overrides=given)


@pytest.fixture
def folder(finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where one small pipeline is finished: its stages are reused."""
    monkeypatch.chdir(tmp_path)
    return copied(finished[0], tmp_path)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Return what a pipeline printed."""

    def printed(*overrides: str) -> str:
        job(*overrides).run()
        return "".join(capfd.readouterr())

    return printed


@pytest.mark.integration
def test_sources_are_rows_of_one_comparison(folder: Path) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    variants = "live:{teachers:live},average:{teachers:momentum},int8:{teachers:runtime},"
    variants += "two:{teachers:ensemble,teachers.teachers:[0,1],trainer.check_val_every_n_epoch:1}"
    printed = kd_lightning(*TINY, f"+variants={{{variants}}}", "reference=live", cwd=folder)
    assert printed.count("reused") == 4  # what is compared with them, and the live one
    assert all(f"distilled {label}" in printed for label in ("live", "average", "int8", "two"))
    _, _, children = runs(folder)
    by_name = {run.info.run_name: run for run in reversed(children)}  # a reused one has no losses
    assert set(by_name) - {"student-hard_label-s0", "control-deit_hard-s0"} == {
        "teacher-hard_label-s0",
        "teacher-hard_label-s1",
        "distilled-kd-T4-s0",
        "distilled-kd-T4-Momentum-s0",
        "distilled-kd-T4-RuntimeTeacher-s0",
        "distilled-kd-T4-Ensemble-s0",
    }
    first, second = (by_name[f"teacher-hard_label-s{seed}"].data.metrics["final/val_acc"] for seed in (0, 1))
    logged = by_name["distilled-kd-T4-Ensemble-s0"].data.metrics
    assert first != second
    assert [logged[f"val/teacher_acc/{i}"] for i in (0, 1)] == pytest.approx([first, second], abs=1e-3)
    assert logged["val/teacher_acc"] > (first + second) / 2 - 0.02
    assert by_name["distilled-kd-T4-Momentum-s0"].data.params["teachers/decay"] == "0.999"
    average = by_name["distilled-kd-T4-Momentum-s0"].data.metrics
    assert average["train/loss/kd"] < 0.1 * by_name["distilled-kd-T4-s0"].data.metrics["train/loss/kd"]
    live, int8 = (predictions(folder, f"distilled-kd-T4{name}-s0") for name in ("", "-RuntimeTeacher"))
    assert 0.9 < (live == int8).mean() < 1


@pytest.mark.integration
def test_the_average_needs_no_teacher_and_the_control_keeps_it(folder: Path, run) -> None:
    printed = run("teachers=momentum", "stages=[student,distilled,verdict]")
    assert printed.count("reused") == 1
    assert "student alone" in printed
    assert run("teachers=momentum", "stages=[teacher,student,control,distilled]").count("reused") == 4
    assert "reused" not in run("teachers=momentum", "teachers.decay=0.5", "stages=[distilled]")


@pytest.mark.integration
def test_a_network_that_learns_along_needs_no_teacher_and_stays_beside_the_student(folder: Path, run) -> None:
    command = ("teachers=peers", "losses.kd.temperature=1", "stages=[student,distilled,verdict]")
    other = "+models@teachers.networks.peer=mlp32"
    assert "student alone" in kd_lightning(*TINY, *command, cwd=folder)
    assert run(*command).count("reused") == 2
    assert "reused" not in run(*command[:2], other, "stages=[distilled]")
    files = folder.glob("mlruns/stages/distilled-kd-T1-Peers-s0-*/final.ckpt")
    first, second = sorted(files, key=lambda file: file.stat().st_mtime)
    student, peer = load_student(first), load_student(first, "peer")
    CNN8().load_state_dict(peer)
    assert not torch.equal(student["head.weight"], peer["head.weight"])
    MLP32().load_state_dict(load_student(second, "peer"))
    _, _, children = runs(folder)
    logged = next(r for r in children if r.info.run_name == "distilled-kd-T1-Peers-s0").data.metrics
    assert logged["train/loss/kd/peer"] != logged["train/loss/kd"]


@pytest.mark.integration
def test_stored_is_the_stage_store_outputs(folder: Path, run) -> None:
    assert "stored outputs: 300 samples" in run("teachers=stored", "stages=[teacher,distilled]")
    assert run("stages=[teacher,store_outputs,distilled]").count("reused") == 2
    # Another seed's are the same, as no sample is augmented.
    printed = run("teachers=stored", "stages=[teacher,distilled]", "seeds=[0,1]")
    assert printed.count("stored outputs: 300 samples") == 1
    assert len(list(folder.glob("mlruns/stages/outputs-*"))) == 1


@pytest.mark.integration
def test_members_from_checkpoints_are_told_apart_by_their_weights(folder: Path, run) -> None:
    (weights,) = folder.glob("mlruns/stages/teacher-*/final.ckpt")
    shutil.copy(weights, "a.ckpt")
    state = load_student(weights)
    torch.save({name: x.roll(1, 0) if name.startswith("head.") else x for name, x in state.items()}, "b.ckpt")
    ensemble = ["teachers=ensemble", "teachers.teachers=[a.ckpt,b.ckpt]", "stages=[distilled]", "teacher.check=false"]
    shares = re.findall(r"teacher-checkpoint-s0: validation accuracy ([\d.]+) %", run(*ensemble))
    assert len(shares) == 2
    assert float(shares[0]) > float(shares[1]) + 20
    network = "+teachers.network={_target_:kd_lightning.models.CNN64,num_classes:10}"
    given = [network, "+teachers.checkpoint=b.ckpt", "stages=[distilled]", "teacher.check=false"]
    assert "[1/1] distilled-kd-T4-s0" in run(*given)
    assert run(*ensemble).count("reused") == 3
    shutil.copy(weights, "b.ckpt")
    assert run(*ensemble).count("reused") == 2  # the members, the second as the first has the same weights
    assert "reused" not in run(*given)


@pytest.mark.integration
@pytest.mark.parametrize(
    "source", [["teachers=momentum"], ["teachers=ensemble", "teachers.teachers=[a.ckpt,b.ckpt]"]], ids=lambda x: x[0]
)
def test_quantised_students_go_on_with_their_source_and_members_are_not_quantised(
    folder: Path, run, source: list[str]
) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    (weights,) = folder.glob("mlruns/stages/teacher-*/final.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        shutil.copy(weights, name)
    printed = run(*source, "stages=[distilled,quantized,verdict]", "quantized.steps=2")
    names = re.findall(r"^\[\d/\d\] ([\w-]+): ", printed, re.MULTILINE)
    assert "quantized-distilled-qat-int8-s0" in names
    assert not [name for name in names if name.startswith("quantized-teacher")]
    assert f"[{len(names)}/{len(names)}]" in printed


@pytest.mark.integration
def test_the_batches_of_ones_own_data_teach_student_and_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_data.py").write_text(DATA)
    stages = "stages=[student,control,distilled,verdict]"
    printed = run("teachers=from_batch", "data._target_=my_data.Answered", stages)
    assert "[3/3] distilled-kd-T4-FromBatch-s0" in printed
    control, alone = (
        predictions(tmp_path, name) for name in ("control-deit_hard-FromBatch-s0", "student-hard_label-s0")
    )
    assert (control == alone).all()  # its teacher gives the labels themselves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teachers=from_batch"], r"FromBatch: the batch brings no outputs of a teacher, expected \(input, target, lo"),
        (
            ["teachers=ensemble", "stages=[distilled]"],
            r"\[0, 1, 2\] are seeds to train the teacher with: add teacher to",
        ),
        (
            ["teachers=ensemble", "teachers.teachers=[0,0]"],
            r"expected .* different seeds and checkpoints.* got \[0, 0\]",
        ),
        (
            ["teachers=ensemble", "teachers.weights=[1,2]"],
            r"expected a weight >= 0 for each of 3 teachers.*got \[1, 2\]",
        ),
        (["teachers=ensemble", "teachers.teachers=[no.ckpt]"], "no.ckpt: there is no such file"),
        (["+teachers.checkpoint=no.ckpt"], "checkpoint=no.ckpt: there is no such file"),
        (["teachers=ensemble", "stages=[teacher,store_outputs,distilled]"], "store_outputs writes .* got Ensemble"),
        (["teachers=momentum", "taught_by=medium"], "taught_by=medium names one network, which Momentum does not take"),
        (["teachers=momentum", "teachers.decay=1.5"], r"expected a decay in \[0, 1\], got 1.5"),
        (["teachers=runtime", "teachers.runtime=tensorrt"], "expected runtime to be one of onnxruntime, openvino, got"),
        (["teachers=live", "teacher.accelerate=[fast]"], "expected .* got 'fast'"),
        (["teachers._target_=my.Source"], r"^teachers\._target_=my\.Source: No module named 'my'"),
        (["teachers=momentun"], "Could not find 'teachers/momentun'"),
    ],
)
def test_a_mistake_is_an_error_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, ImportError, InstantiationException, MissingConfigException), match=message):
        job(*arguments).run()
    assert not list(tmp_path.glob("mlruns/stages/*/final.ckpt"))
