"""What is found before the first stage, and what looking for it leaves as it was."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.cli import conf_dir
from kd_lightning.configuration.assembling import pipeline
from kd_lightning.data import FashionMNIST
from kd_lightning.models import CNN64
from kd_lightning.pipeline.preflight import check_trainings

STORED = ["teachers=stored", "stages=[teacher,store_outputs,distilled]"]
IN_FLOAT = "stages=[teacher,student,control,distilled,verdict]"


def check(*arguments: str) -> None:
    """Do what the command line does before its first stage, but for writing."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        overrides = [IN_FLOAT, *arguments]
        made = pipeline(hydra.compose("config", overrides), overrides=overrides)
        check_trainings(made._trainings(), made.quantized)


def refusal(*arguments: str) -> str:
    with pytest.raises(ValueError, match=r".+") as caught:
        check(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Found as soon as the configuration is read.
        (["trainer.max_steps=ten"], "trainer.max_steps=ten: expected a whole number, got 'ten'"),
        (["trainer.max_steps=10.5"], "trainer.max_steps=10.5: expected a whole number, got 10.5"),
        (["optimizer.lr=fast"], "optimizer.lr=fast: expected a finite number, got 'fast'"),
        (["losses.kd.temperature=four"], "losses.kd.temperature=four: expected a finite number, got 'four'"),
        (["losses.kd.temperature=inf"], "losses.kd.temperature=inf: expected a finite number, got inf"),
        (["losses.kd.weight=heavy"], "losses.kd.weight=heavy: expected a finite number"),
        (["+losses.kd.temprature=3"], "losses.kd.temprature: KD has no such argument, expected one of temperature"),
        (["losses.kd=3"], "losses.kd=3: expected a mapping with _target_"),
        (["losses=[]"], "losses: expected a mapping, got nothing"),
        (["losses.kd._target_=my.Loss"], "losses.kd._target_=my.Loss: No module named 'my'"),
        (["seeds=[]"], "seeds=[]: expected at least one"),
        (["seeds=3"], "seeds=3: expected a list, each a whole number, got 3"),
        (["seeds=[0,0]"], "seeds=[0,0]: expected different ones"),
        (["seeds=[0.5]"], "seeds=[0.5]: expected a whole number at 0, got 0.5"),
        (["seeds=[-1]"], "seeds=[-1]: expected whole numbers from 0"),
        (["stages=[verdict]"], "stages=[verdict]: expected teacher, student, control or distilled among them"),
        (["stages=[quantized]"], "stages=[quantized]: expected teacher, student, control or distilled among them"),
        (["stages=[control,quantized]"], "stages=[control,quantized]: expected teacher, student or distilled beside"),
        (["stages=teacher"], "stages=teacher: expected a list"),
        (["stages=[teacher,destilled]"], "stages=[teacher,destilled]: expected some of teacher"),
        (["stages=[teacher,teacher]"], "stages=[teacher,teacher]: expected some of"),
        (["teacher.checkpoint=/"], "teacher.checkpoint=/: is a folder, expected a file"),
        (["teacher.checkpoint=nowhere"], "teacher.checkpoint=nowhere: there is no such file"),
        (["stored_outputs.views=two", *STORED], "stored_outputs.views=two: expected a whole number"),
        (["+teacher.lr=3"], "teacher.lr: nothing reads it"),
        (["+learning_rate=3"], "learning_rate: nothing reads it"),
        (["work_dir=''"], "work_dir='': expected a folder"),
        (
            ["quantized.steps=0", "stages=[teacher,quantized]"],
            "quantized.steps=0: expected quantized.steps of 1 or more",
        ),
        (["+variants={a:{losses.kd.temperature:four}}"], "variants.a: losses.kd.temperature=four: expected a finite"),
        # Found as parts are made and run dry.
        (["trainer.max_steps=0"], "trainer.max_steps=0: expected max_steps of 1 or more"),
        (["trainer.max_steps=-1"], "trainer.max_steps=-1: expected max_steps of 1 or more"),
        (["trainer.max_steps=-5"], "trainer.max_steps=-5: "),
        (["teacher.trainer.max_steps=0"], "teacher.trainer.max_steps=0: expected max_steps of 1 or more"),
        (["trainer.accelerator=quantum"], "trainer.accelerator=quantum: "),
        (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0: expected accumulate_grad_batches"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1: expected gradient_clip_val of 0 or more"),
        (["optimizer.lr=-1"], "optimizer.lr=-1: Invalid learning rate: -1"),
        (["optimizer.lr=0"], "optimizer.lr=0|scheduler.max_lr=0|scheduler: expected a learning rate above 0"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay=-1: Invalid weight_decay value: -1"),
        (
            ["scheduler=cosine", "scheduler.eta_min=-1"],
            "scheduler.eta_min=-1: expected a learning rate of 0 or more",
        ),
        (["+scheduler.total_steps=100"], "scheduler.total_steps=100: ValueError|scheduler.total_steps=100: Tried to"),
        (["losses.kd.temperature=-1"], "losses.kd.temperature=-1: expected temperature > 0, got -1"),
        (
            ["student.network.num_classes=7"],
            "student.network, student.losses, data: the student has 7 outputs and the data 10 classes",
        ),
        (["models@student.network=resnet8x4"], "student.network, student.losses, data: .*cannot take a batch"),
        (
            ["losses=[kd,hint]", "losses.hint.student_layer=blok", "losses.hint.teacher_layer=hidden"],
            "losses.hint.student_layer=blok: the student CNN8 has no layer 'blok'",
        ),
        (["data.labelled=-5"], "data.labelled=-5: expected labelled of 0 or more"),
        (["data.split_seed=-1"], "data.split_seed=-1: expected split_seed of 0 or more"),
        (
            ["task.recall_classes=[99]"],
            r"task.recall_classes=\[99\]: expected recall_classes from 0 to 9, got 99",
        ),
        (["task.recall_classes=[-1]"], r"task.recall_classes=\[-1\]: expected recall_classes from 0, got \[-1\]"),
        (["task.recall_classes=boot"], "task.recall_classes=boot: expected a list"),
        (["task.class_dim=3"], "task.class_dim=3: expected class_dim to be 1 for"),
        (["+task.labels=3"], "task.labels: Classification has no such argument, expected one of class_dim"),
        (["task._target_=builtins.dict"], "task: expected a kd_lightning.tasks.Task, got a dict"),
        (["+variants={a:{task.class_dim:2}}"], "variants.a: sets task, expected one for all models"),
        (["stored_outputs.format=float8"], "stored_outputs.format=float8: expected format float16, uint8"),
        (["stored_outputs.views=0"], "stored_outputs.views=0: expected 1 or more of each sample"),
        (["stored_outputs.format=top3", "losses=[dkd]", *STORED], r"stored_outputs.format=top3: losses \['dkd'\]"),
        (
            ["callbacks=[temperature_schedule]", "callbacks.temperature_schedule.schedule.end=-1"],
            "callbacks.temperature_schedule: the schedule of .temperature. gives",
        ),
        (
            ["callbacks=[quantization_aware_training]", "callbacks.quantization_aware_training.spec.skip=[no]"],
            "callbacks.quantization_aware_training: skip names 'no', which is no module",
        ),
        (
            ["teachers=momentum", "teachers.decay={_target_:kd_lightning.schedules.linear,start:0.9,end:2}"],
            "teachers.*: .*got 1.0",
        ),
        (
            [
                "stages=[teacher,store_outputs,distilled]",
                "losses=[wkd_logits]",
                "losses.wkd_logits.teacher_classifier=head",
            ],
            r"losses: losses \['wkd_logits'\] look into the teacher's network.*got Stored",
        ),
        (["taught_by=medium"], r"taught_by: distilled-kd-T4-s0 is taught by 'medium', expected one of \['teacher'\]"),
        (["losses.hard_label.weight=-0.5"], "losses.hard_label.weight=-0.5: expected weight >= 0, got -0.5"),
        (["stages=[distilled]"], "stages: distilled-kd-T4-s0 needs a teacher: add teacher to the stages"),
        (["data.labelled=7000"], "data: expected up to 6000 images, got 7000 + 0: ask for fewer labelled + unlabelled"),
        (["+variants={a:{losses.kd.temprature:3}}"], "variants.a: variant 'a' sets losses.kd.temprature, expected"),
        (["+variants={a:{losses:[kdd]}}"], "variants.a: variant 'a' sets losses, .*Could not load 'losses/kdd'"),
        (["+variants={teacher:{losses:[kd]}}"], "variants.teacher: expected another name than that of a role"),
        (["+variants={a:{losses:[kd]}}", "reference=b"], r"reference 'b' is no distilled model, expected .* \['a'\]"),
        (
            ["callbacks=[temperature_schedule]", "losses=[hard_label]"],
            "callbacks.temperature_schedule: no loss has a temperature to schedule",
        ),
        (
            ["losses=[kd,at]", "losses.at.student_layers=[block1,no]", "losses.at.teacher_layers=[block3,block4]"],
            r"losses.at.student_layers=\['block1', 'no'\]: the student CNN8 has no layer 'no'",
        ),
        (["optimizer=sgd", "optimizer.weight_decay=[[1]]"], "optimizer.weight_decay=.*: expected a finite number"),
    ],
)
def test_a_mistake_is_named_with_its_path(arguments: list[str], message: str) -> None:
    said = refusal(*arguments)
    assert message in said or re.match(message, said), said


class Data(FashionMNIST):
    """Few images, quickly read; a test changes its loaders."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"labelled": 64, "teacher_images": 64, **options})


def loader(count: int, target: int = 0, value: float = 0.0) -> DataLoader:
    return DataLoader(TensorDataset(torch.full((count, 1, 28, 28), value), torch.full((count,), target)), batch_size=8)


class Empty(Data):
    def test_dataloader(self) -> DataLoader:
        return loader(0)


class Unlabelled(Data):
    def val_dataloader(self) -> DataLoader:
        return loader(8, target=-100)


class OtherLabels(Data):
    def test_dataloader(self) -> DataLoader:
        return loader(8, target=10)


class NotFinite(Data):
    def test_dataloader(self) -> DataLoader:
        return loader(8, value=torch.nan)


class Mappings(Data):
    def val_dataloader(self) -> DataLoader:
        return DataLoader([{"x": torch.zeros(1, 28, 28), "labels": 0, "file": "boot.png"}], batch_size=1)


class Corrupt(Data):
    def test_dataloader(self) -> None:
        raise OSError(5, "Input/output error", "images/boot.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Empty, "data: the test split is empty, expected at least one batch"),
        (Unlabelled, "data: the validation split has no labels"),
        (OtherLabels, "student.network, data: label 10 is out of range, expected 0 to 9"),
        (NotFinite, "data: the test inputs hold NaN or infinite values"),
        (Mappings, r"data: a batch of the validation split has file \(list\) that is none, expected tensors, one row"),
        (Corrupt, "data: Input/output error: images/boot.png"),
    ],
)
def test_validation_and_test_are_read_before_the_training(
    monkeypatch: pytest.MonkeyPatch, data: type[LightningDataModule], message: str
) -> None:
    monkeypatch.setattr("kd_lightning.data.FashionMNIST", data)
    assert re.search(message, refusal("stages=[student]"))


@pytest.fixture(scope="module")
def trained() -> CNN64:
    """A teacher of a few seconds, well above chance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, data = CNN64(), FashionMNIST(teacher_images=1000, role="teacher")
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(2):
            for images, target in data.train_dataloader():
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(images), target).backward()
                optimizer.step()
    return network


def _not_finite(state: dict[str, torch.Tensor]) -> None:
    state["block1.0.weight"][0] = torch.nan


def _permuted(state: dict[str, torch.Tensor]) -> None:
    for name in ("head.weight", "head.bias"):
        state[name] = state[name].roll(1, 0)


def _untrained(state: dict[str, torch.Tensor]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state.update(CNN64().state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_not_finite, "holds NaN or infinite weights in block1.0.weight"),
        (_permuted, "would have .* with its classes in another order"),
        (_untrained, "is at chance: accuracy .* on 256 validation images, expected well above 10.0 %"),
    ],
)
def test_a_teachers_checkpoint_is_tried(
    tmp_path: Path, trained: CNN64, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    state = {name: x.clone() for name, x in trained.state_dict().items()}
    torch.save(state, tmp_path / "good.ckpt")
    change(state)
    torch.save(state, tmp_path / "bad.ckpt")
    check("stages=[distilled]", f"teacher.checkpoint={tmp_path}/good.ckpt")
    said = refusal("stages=[distilled]", f"teacher.checkpoint={tmp_path}/bad.ckpt")
    assert said.startswith("teacher.checkpoint: ")
    assert re.search(message, said)
    if change is not _not_finite:
        check("stages=[distilled]", f"teacher.checkpoint={tmp_path}/bad.ckpt", "teacher.check=false")


def test_looking_changes_no_generator_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    check("losses=[hard_label,kd,crd]", "losses.crd.student_layer=flatten", "losses.crd.teacher_layer=hidden")
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert random.getstate() == state[2]
    assert not list(tmp_path.iterdir())
