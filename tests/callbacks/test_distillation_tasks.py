"""Outputs and targets of another task than the callback was given: nothing is trained on the wrong loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import Distillation
from kd_lightning.losses import DKD, KD, HardLabel, LogitsMSE, SigmoidKD, TeacherRegression, kd
from kd_lightning.tasks import Classification, MultiLabel, Regression
from kd_lightning.teachers import FromBatch
from tests.tiny import assert_equal, good_teacher, network, samples, trainer, weights

X, LABELS = samples(32)
RANDOM = torch.Generator().manual_seed(0)
VALUES = torch.randn(32, 4, generator=RANDOM)
MULTI_HOT = (torch.rand(32, 4, generator=RANDOM) > 0.6).float()
ONE_HOT = F.one_hot(LABELS, 4).float()
MIXED = 0.7 * ONE_HOT + 0.3 * ONE_HOT.flip(0)
SERIES = torch.randn(32, 2, 10, generator=RANDOM)
STEPS = torch.randint(4, (32, 10), generator=RANDOM)


class Theirs(LightningModule):
    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Series(nn.Module):
    """(B, 2, L) to (B, 4, L), the classes second."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv1d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def fit(
    parts: tuple[Tensor, ...], loss: Any, losses: Any, student: Any = None, teacher: Any = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the trained weights and what was logged."""
    seed_everything(0, verbose=False)
    module = Theirs(network() if student is None else student, loss)
    data = DataLoader(list(zip(*parts, strict=True)), batch_size=8)
    teacher = good_teacher() if teacher is None else teacher
    it = trainer(callbacks=[Distillation(teacher, losses, "net", **options)], log_every_n_steps=1)
    it.fit(module, data, data)
    return weights(module), {name: float(value) for name, value in it.callback_metrics.items()}


def bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y.float())


def unused(z: Tensor, y: Tensor) -> Tensor:
    return 0 * z.sum()


def pinball(z: Tensor, y: Tensor) -> Tensor:
    levels = torch.tensor([0.1, 0.4, 0.6, 0.9])
    miss = y.reshape(len(y), -1)[:, :1] - z
    return torch.maximum(levels * miss, (levels - 1) * miss).mean()


LABELLED = {"kd": KD(), "hard_label": HardLabel()}
REFUSED = {
    "several labels": ((X, MULTI_HOT), bce, {"kd": KD()}, r"multi-hot.*task=MultiLabel\(\)"),
    "several labels, which a loss reads": ((X, MULTI_HOT), bce, LABELLED, r"multi-hot.*task=MultiLabel\(\)"),
    "several labels, as integers": ((X, MULTI_HOT.long()), bce, {"kd": KD()}, r"multi-hot.*task=MultiLabel\(\)"),
    "several labels, as bools": ((X, MULTI_HOT.bool()), bce, {"dkd": DKD()}, r"multi-hot.*task=MultiLabel\(\)"),
    "quantities": ((X, VALUES), F.mse_loss, {"kd": KD()}, r"negative.*task=Regression\(\)"),
    "quantiles of one quantity": ((X, VALUES[:, 0]), pinball, {"kd": KD()}, r"one quantity a sample.*Regression\(\)"),
    "quantiles, a column": ((X, VALUES[:, :1]), pinball, {"kd": KD()}, r"\(8, 1\), one quantity a sample.*Regression"),
}


@pytest.mark.parametrize(("parts", "loss", "losses", "message"), REFUSED.values(), ids=REFUSED)
def test_a_softmax_over_what_are_no_classes_is_refused(parts: Any, loss: Any, losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(parts, loss, losses)


def test_probabilities_are_classes_and_several_labels_are_theirs() -> None:
    for targets in (ONE_HOT, MIXED, ONE_HOT.long()):
        _, logged = fit((X, targets), lambda z, y: F.cross_entropy(z, y.float()), {"kd": KD()})
        assert logged["val/agreement"] > 0
    _, logged = fit((X, MULTI_HOT), bce, {"kd": SigmoidKD()}, task=MultiLabel(), check_teacher=False)
    assert {"val/agreement", "val/teacher_f1"} <= set(logged)


ONE = {"float": VALUES[:, :1].sigmoid().round(), "row": MULTI_HOT[:, 0], "int": MULTI_HOT[:, :1].long(), "none": X}


@pytest.mark.parametrize("targets", ONE.values(), ids=ONE)
def test_a_softmax_over_one_output_is_refused(targets: Tensor) -> None:
    message = r"one output, expected two or more for losses \['kd'\].*always 1.*task=Regression\(\)"
    with pytest.raises(ValueError, match=message):
        fit((X, targets), unused, {"kd": KD()}, network(classes=1), network(1, classes=1))


def test_one_output_is_distilled_as_a_label_or_a_value() -> None:
    one = {"student": network(classes=1), "teacher": network(1, classes=1), "check_teacher": False}
    labels = MULTI_HOT[:, :1]
    _, logged = fit((X, labels), bce, {"kd": SigmoidKD()}, task=MultiLabel(), **one)
    assert logged["train/loss/kd"] > 0
    assert 0 < logged["val/agreement"] <= 1
    _, logged = fit((X, VALUES[:, :1]), F.mse_loss, {"value": TeacherRegression()}, task=Regression(), **one)
    assert logged["train/loss/value"] > 0


def test_classes_that_come_second_are_named_and_then_compared() -> None:
    def distill(parts: Any, losses: Any, **options: Any) -> Any:
        return fit(parts, F.cross_entropy, losses, Series(0), Series(1), check_teacher=False, **options)

    both = r"class_dim=2\) for \(B, S, C\), or class_dim=1 for \(B, C, L\)"
    with pytest.raises(ValueError, match=both):
        distill((SERIES, STEPS), {"kd": KD()})
    with pytest.raises(ValueError, match=both):  # as many steps as classes
        distill((SERIES[..., :4], STEPS[:, :4]), {"kd": KD()})
    with pytest.raises(ValueError, match=r"pass task=Classification\(class_dim=1\)"):
        distill((SERIES, STEPS), {"kd": KD(), "hard_label": HardLabel()})
    with pytest.raises(ValueError, match=both):  # nothing is labelled
        fit((SERIES, SERIES), unused, {"kd": KD()}, Series(0), Series(1))
    _, logged = distill((SERIES, STEPS), {"kd": KD(temperature=2.0)}, task=Classification(class_dim=1))

    student = Series(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for i in range(0, 32, 8):
        rows = [net(SERIES[i : i + 8]).transpose(1, 2).flatten(0, 1) for net in (student, Series(1))]
        value = kd(rows[0], rows[1].detach(), temperature=2.0)
        optimizer.zero_grad()
        (F.cross_entropy(student(SERIES[i : i + 8]), STEPS[i : i + 8]) + value).backward()
        optimizer.step()
    assert logged["train/loss/kd"] == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("targets", [VALUES[:, 0], VALUES[:, :1], VALUES[:, :3]], ids=["(N,)", "(N, 1)", "(N, 3)"])
def test_values_that_are_no_classes_have_no_agreement_and_no_accuracy(targets: Tensor) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return pinball(z, y)

    _, logged = fit((X, targets), loss, {"mse": LogitsMSE()})
    assert not [name for name in logged if "agreement" in name or "teacher" in name]
    assert logged["train/loss/mse"] > 0


def test_of_a_regression_the_teachers_error_is_said() -> None:
    _, logged = fit((X, VALUES), F.mse_loss, {"mse": LogitsMSE()}, task=Regression(), check_teacher=False)
    assert "val/teacher_acc" not in logged
    teacher = good_teacher().eval()(X)
    assert logged["val/teacher_mae"] == pytest.approx(float((teacher - VALUES).abs().mean()), rel=1e-4)


@pytest.mark.parametrize("width", [2, 4])
def test_weights_of_the_samples_are_not_taken_for_the_teachers_logits(width: int) -> None:
    third = torch.rand(32, width, generator=torch.Generator().manual_seed(1))
    expected, said = fit((X, LABELS), F.cross_entropy, {"kd": KD()})
    found, logged = fit((X, LABELS, third), F.cross_entropy, {"kd": KD()})
    assert_equal(found, expected)
    assert logged == said
    if width == 2:
        with pytest.raises(ValueError, match="4 classes and the teacher 2"):
            fit((X, LABELS, third), F.cross_entropy, {"kd": KD()}, teacher=FromBatch())
