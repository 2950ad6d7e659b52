"""What somebody passes from Python by mistake is one error with a remedy before the first step, or simply works."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from kd_lightning import Distillation, DistillationModule, Teacher
from kd_lightning.callbacks import HyperparameterSchedule, TemperatureSchedule
from kd_lightning.losses import DKD, KD, DistillationLoss, HardLabel, LogitsMSE
from kd_lightning.schedules import linear, step, warmup
from kd_lightning.teachers import Peers
from tests.doors import DOORS, Fit
from tests.tiny import CLASSES, distillation, good_teacher, loader, network, samples, sgd, trainer

LOSSES = {"hard_label": lambda: HardLabel(weight=0.1), "kd": lambda: KD()}


def losses() -> dict[str, DistillationLoss]:
    return {name: make() for name, make in LOSSES.items()}


def with_labels(labels: Any, x: Tensor | None = None) -> DataLoader:
    x = samples(24)[0] if x is None else x
    if isinstance(labels, list):
        return DataLoader(list(zip(x, labels, strict=True)), batch_size=8)
    return DataLoader(TensorDataset(x, labels), batch_size=8)


def message_of(fit: Fit, data: Any, **options: Any) -> str:
    """Of the one error, before the first step; its cause chain may be long, its text is not."""
    with pytest.raises((ValueError, TypeError)) as caught:
        fit(data, options.pop("losses", None) or losses(), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Labels

Y = samples(24)[1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_labels_of_any_integer_type_train_as_int64_does(dtype: torch.dtype) -> None:
    fits = []
    for labels in (Y, Y.to(dtype)):
        module = distillation(losses=losses())
        trainer().fit(module, with_labels(labels))
        fits.append(module.student.head.weight)
    assert torch.equal(*fits)


def test_bools_are_classes_0_and_1() -> None:
    module = distillation(network(classes=2), network(3, classes=2), losses=losses(), check_teacher=False)
    trainer().fit(module, with_labels(Y > 1))
    assert module.trainer.global_step == 3


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (Y.float(), r"the target is float32 of shape (8,), expected class indices as int64"),
        (
            Y[:, None],
            "int64 of shape (8, 1), expected class indices (N,) for logits (N, 4): call target.squeeze(1)",
        ),
        (
            nn.functional.one_hot(Y, CLASSES),
            "for logits (N, 4): one-hot labels become indices by target.argmax(1)",
        ),
        ([str(int(y)) for y in Y], "the target is a tuple of str, expected a tensor of class indices: map each label"),
        (torch.ones(24, CLASSES), "a row that sums to 4, expected class indices, or probabilities that sum to 1"),
        (torch.tensor([2.0, -1.0, 0.0, 0.0]).expand(24, 4).contiguous(), "negative or NaN values, expected class ind"),
    ],
    ids=["float", "column", "one-hot", "strings", "multi-hot", "negative"],
)
def test_labels_that_are_no_class_indices(labels: Any, told: str) -> None:
    assert told in message_of(DOORS[0], with_labels(labels))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (Y.float(), "the target is float32 of shape (2,)"),
        (nn.functional.one_hot(Y, CLASSES), "target.argmax(1)"),
    ],
    ids=["float", "one-hot"],
)
def test_so_under_the_callback_where_a_loss_reads_them(labels: Tensor, told: str) -> None:
    assert told.replace("(2,)", "(8,)") in message_of(DOORS[1], with_labels(labels))


@pytest.mark.parametrize("fit", DOORS)
def test_classes_without_a_training_sample_are_named_once(fit: Fit) -> None:
    few = torch.where(Y == 3, 1, Y)
    for data in (with_labels(few), DataLoader(Subset(TensorDataset(*samples(24)), range(3)), batch_size=3)):
        with pytest.warns(UserWarning, match=r"labelled with 1 of the student's 4 classes: 3$"):
            fit(data, losses())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no training sample.*")
        fit(with_labels(Y), losses())
        fit(with_labels(few), {"kd": KD()})  # which reads no label


@pytest.mark.parametrize("fit", DOORS)
def test_ten_outputs_for_four_named_classes(fit: Fit) -> None:
    class Named(LightningDataModule):
        class_names = ("a", "b", "c", "d")

        def train_dataloader(self) -> DataLoader:
            return loader()

    assert fit(Named(), losses()).global_step == 4
    told = message_of(fit, Named(), student=network(classes=10), teacher=network(1, classes=10))
    assert told.startswith("the student has 10 outputs and the data 4 classes (a, b, c, …), expected as many: set num")


# Inputs


@pytest.mark.parametrize("fit", DOORS)
def test_inputs_in_double_precision(fit: Fit) -> None:
    data = with_labels(Y, samples(24)[0].double())
    told = message_of(fit, data)
    assert "float64" in told
    assert "expected one precision: convert" in told
    assert 'precision="64-true"' in told
    assert fit(data, losses(), precision="64-true").global_step == 3


# Networks


@pytest.mark.parametrize("fit", DOORS)
@pytest.mark.parametrize("end", [nn.Sigmoid, lambda: nn.Softmax(-1)])
def test_a_student_that_ends_in_probabilities(fit: Fit, end: Any) -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.end = network(), end()

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.net(x))[:, None].squeeze(1).clone()

    told = message_of(fit, loader(), student=Ends())
    assert "expected logits from the student, got probabilities (it ends in a s" in told


@pytest.mark.parametrize("fit", DOORS)
def test_outputs_that_merely_lie_between_0_and_1_are_logits(fit: Fit) -> None:
    zero = network()
    nn.init.zeros_(zero.head.weight)
    nn.init.constant_(zero.head.bias, 0.1)
    assert fit(loader(), losses(), student=zero).global_step == 4


def test_a_teacher_that_ends_in_a_sigmoid() -> None:
    teacher = nn.Sequential(good_teacher(), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"expected logits from the teacher, got values between 0 and 1 .*sigmoid"):
        trainer().fit(distillation(teacher=Teacher(teacher)), loader(200))


@pytest.mark.parametrize("fit", DOORS)
def test_a_frozen_student(fit: Fit) -> None:
    frozen = network().requires_grad_(False)

    def anything(_: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    told = message_of(fit, loader(), student=frozen, optimizer=anything)
    assert "the student Network is frozen: none of its parameters requires a gradient" in told
    assert "requires_grad_(True)" in told


@pytest.mark.parametrize("fit", DOORS)
def test_layers_that_are_frozen_on_purpose_are_not_missed(fit: Fit) -> None:
    partly = network()
    partly.stem.requires_grad_(False)
    assert fit(loader(), losses(), student=partly).global_step == 4


@pytest.mark.parametrize("fit", DOORS)
def test_an_optimizer_over_other_parameters(fit: Fit) -> None:
    other = network(5)
    told = message_of(fit, loader(), optimizer=lambda _: sgd(other.parameters()))
    assert "leaves out 6 of 6 parameters of the student" in told
    assert "requires_grad_(False)" in told
    student = network()
    told = message_of(fit, loader(), student=student, optimizer=lambda _: sgd(student.head.parameters()))
    assert "leaves out 4 of 6 parameters of the student" in told
    assert "(stem.weight, stem.bias, norm.weight, …)" in told


@pytest.mark.parametrize("fit", DOORS)
def test_one_network_as_student_and_teacher(fit: Fit) -> None:
    same = network()
    assert "student and teacher are the same network" in message_of(fit, loader(), student=same, teacher=same)


@pytest.mark.parametrize("fit", DOORS)
def test_one_output_has_no_softmax(fit: Fit) -> None:
    one = {"student": network(classes=1), "teacher": network(1, classes=1)}
    told = message_of(fit, with_labels(torch.zeros(24).long()), losses={"kd": KD()}, **one)
    assert "the student has one output, expected two or more for losses ['kd']" in told
    one = {"student": network(classes=1), "teacher": network(1, classes=1)}
    assert fit(with_labels(torch.zeros(24).long()), {"mse": LogitsMSE()}, **one).global_step == 3


@pytest.mark.parametrize("fit", DOORS)
def test_targets_of_another_task_are_told_where_no_loss_reads_them(fit: Fit) -> None:
    several = (torch.arange(24 * CLASSES).reshape(24, CLASSES) % 2).float()
    assert "pass task=MultiLabel()" in message_of(fit, with_labels(several), losses={"kd": KD()})
    one = {"student": network(classes=1), "teacher": network(1, classes=1)}
    told = message_of(fit, with_labels(torch.rand(24, 1)), losses={"mse": LogitsMSE()}, **one)
    assert "pass task=Regression() for a quantity" in told


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a network \(nn.Module\) as student, got a Teacher: a teacher goes"):
        distillation(Teacher(network()), network(1))
    with pytest.raises(ValueError, match=r"source such as Teacher.network. as teacher, got 'resnet18'"):
        distillation(teacher="resnet18")


def test_what_is_made_already_is_named() -> None:
    student = network()
    optimizer = sgd(student.parameters())
    with pytest.raises(ValueError, match=r"expected optimizer= to be a function .*got a SGD: pass optimizer="):
        distillation(student, optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match=r"expected scheduler= to be a function .*got a StepLR: pass scheduler=lambda"):
        distillation(student, scheduler=scheduler)
    with pytest.raises(ValueError, match=r"expected optimizer= to make a torch.optim.Optimizer, got a list"):
        trainer().fit(distillation(optimizer=list), loader())


# Losses


@pytest.mark.parametrize("make", [
    lambda losses: DistillationModule(network(), good_teacher(), losses, sgd),
    lambda losses: Distillation(good_teacher(), losses),
    lambda losses: DistillationModule(network(), Peers({"b": network(1)}), losses, sgd),
])  # fmt: skip
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([KD()], r"expected losses by name, got a list: pass \{'kd': KD\(\), ...\}"),
        (KD(), "expected losses by name, got a KD"),
        ({}, "expected at least one loss, got none"),
        ({"a.b": KD()}, "expected a loss's name to be a word without dots, got 'a.b': rename it"),
        ({1: KD()}, "expected a loss's name to be a word without dots, got 1"),
        ({"train": KD()}, "got 'train'"),
        ({"kd": KD}, "loss 'kd' is the class KD, expected a DistillationLoss: call it"),
    ],
    ids=str,
)
def test_losses_that_are_not_by_name(make: Any, wrong: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        make(wrong)


@pytest.mark.parametrize("value", ["4", math.inf, math.nan, 0, -1.0, True, None, [4]])
def test_temperatures_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match=r"expected temperature > 0, got .*: 1 leaves the logits as they are"):
        KD(temperature=value)
    if value != 0:
        with pytest.raises(ValueError, match=r"expected weight >= 0, got .*: leave the loss out|pass 0"):
            KD(weight=value)
        with pytest.raises(ValueError, match="expected beta >= 0, got"):
            DKD(beta=value)
        with pytest.raises(ValueError, match=r"expected task_weight >= 0, got .*: 0 leaves the module's own loss out"):
            Distillation(good_teacher(), {"kd": KD()}, task_weight=value)


def test_numbers_of_numpy_are_numbers() -> None:
    assert KD(np.float32(2), weight=np.int64(3)).temperature == 2


# Schedules


@pytest.mark.parametrize("fit", DOORS)
@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (
            lambda: HyperparameterSchedule("losses.kd.weight", linear(1.0, -0.1)),
            "'losses.kd.weight' gives -0.0.* after 91",
        ),
        (
            lambda: HyperparameterSchedule("losses.kd.weight", step([1, -1, 1], [0.301, 0.303])),
            "gives -1 after 30.1% of",
        ),
        (lambda: HyperparameterSchedule("losses.kd.weight", lambda p: math.nan), "gives nan after 0.0%.* of 0 or more"),
        (
            lambda: HyperparameterSchedule("losses.kd.weight", warmup("1", 0.5)),
            "'losses.kd.weight' cannot be computed",
        ),
        (lambda: HyperparameterSchedule("losses.kd.temperature", linear(4.0, 0.0)), "gives 0.0 after 100.0%.*above 0"),
        (lambda: HyperparameterSchedule("losses.dkd.alpha", lambda p: math.inf), "gives inf .*are finite numbers"),
        (lambda: TemperatureSchedule(linear(4.0, -1.0)), "'temperature' gives 0.0 after 80.0%.*above 0 throughout"),
        (lambda: TemperatureSchedule(lambda p: math.inf), "gives inf after 0.0%"),
    ],
)
def test_a_schedule_is_looked_at_as_a_whole(fit: Fit, callback: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fit(loader(), {"kd": KD(), "dkd": DKD()}, callbacks=[callback()])


def test_what_lies_between_is_looked_at_when_it_comes() -> None:
    data, callback = loader(64), HyperparameterSchedule("losses.kd.weight", lambda p: -1.0 if p == 1 / 7 else 1.0)
    fit = trainer(callbacks=[callback], max_steps=7)
    with pytest.raises(ValueError, match=r"gives -1.0 after 14.3% of the training"):
        fit.fit(distillation(losses={"kd": KD()}), data)
    assert fit.global_step == 1
