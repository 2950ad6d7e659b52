"""Networks that answer for each pixel or each token are distilled and scored like those that answer for a sample."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, DistillationModule
from kd_lightning.losses import CWD, DKD, KD, DistillationLoss, ForwardKL, HardLabel, Hint, kd
from kd_lightning.tasks.base import relative_entropy
from tests.losses.reference import wave
from tests.tiny import loader, network, sgd, trainer

CLASSES, VOCABULARY, IGNORED = 3, 11, -100


class Pixels(nn.Module):
    """(B, 2, 5, 4) to (B, CLASSES, 5, 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.stem(x)))


class Tokens(nn.Module):
    """(B, S) to (B, S, VOCABULARY)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Existing(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        return F.cross_entropy(logits if logits.ndim == 4 else logits.mT, batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.parameters())


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def made(kind: type[nn.Module], width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind(width)


def images() -> TensorDataset:
    x = wave((12, 2, 5, 4), 0.7, 0.1).float()
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    labels[:, 0] = IGNORED  # nobody has labelled the first row
    return TensorDataset(x, labels)


def texts() -> TensorDataset:
    tokens = (torch.arange(12 * 6) * 7 % VOCABULARY).reshape(12, 6)
    labels = tokens.roll(-1, 1)
    labels[:, 4:] = IGNORED
    return TensorDataset(tokens, labels)


KINDS = {
    "pixels": (Pixels, images, lambda: {"kd": KD(2.0), "cwd": CWD(temperature=2.0), "dkd": DKD()}),
    "tokens": (Tokens, texts, lambda: {"kd": KD(2.0), "forward_kl": ForwardKL(), "dkd": DKD()}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("front_door", ["module", "callback"])
def test_a_student_comes_to_agree_with_its_teacher(kind: str, front_door: str) -> None:
    make, dataset, losses = KINDS[kind]
    student, teacher = made(make, 8, 0), made(make, 9, 1)
    data = DataLoader(dataset(), batch_size=4)
    if front_door == "module":
        module, callbacks = DistillationModule(student, teacher, losses(), adam, check_teacher=False), []
    else:
        module = Existing(student)
        callbacks = [Distillation(teacher, losses(), student="net", task_weight=0.0, check_teacher=False)]
    fit = trainer(max_epochs=60, callbacks=callbacks)
    fit.validate(module, data)
    before = agreement(student, teacher, dataset())
    fit.fit(module, data, data)
    after = agreement(student, teacher, dataset())
    assert before < 0.7 < 0.9 < after
    assert fit.callback_metrics["val/agreement"].item() == pytest.approx(after, abs=1e-6)
    x, y = dataset().tensors
    right = (classes(teacher(x)) == y)[y != IGNORED].float().mean()
    assert fit.callback_metrics["val/teacher_acc"].item() == pytest.approx(right.item(), abs=1e-6)
    if front_door == "module":
        right = (classes(student(x)) == y)[y != IGNORED].float().mean()
        assert fit.callback_metrics["val/acc"].item() == pytest.approx(right.item(), abs=1e-6)


def classes(logits: Tensor) -> Tensor:
    return logits.argmax(1 if logits.ndim == 4 else -1)


def agreement(student: nn.Module, teacher: nn.Module, data: TensorDataset) -> float:
    x = data.tensors[0]
    return (classes(student(x)) == classes(teacher(x))).float().mean().item()


def test_every_pixel_is_distilled_and_only_tokens_that_are_text() -> None:
    for kind, counted in (("pixels", False), ("tokens", True)):
        make, dataset, _ = KINDS[kind]
        student, teacher = made(make, 8, 0), made(make, 9, 1)
        module = DistillationModule(student, teacher, {"kd": KD(2.0)}, sgd, check_teacher=False)
        fit = trainer(max_steps=1, logger=False, log_every_n_steps=1)
        x, y = dataset().tensors
        expected = kd(student(x), teacher(x), y if counted else None, temperature=2.0)
        fit.fit(module, DataLoader(dataset(), batch_size=12))
        torch.testing.assert_close(fit.callback_metrics["train/loss/kd"], expected.detach())


def test_the_entropy_of_soft_targets_is_over_classes() -> None:
    logits = torch.zeros(2, CLASSES, 5, 4)
    assert relative_entropy(logits).item() == pytest.approx(1)
    logits[:, 0] = 100.0
    assert relative_entropy(logits).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("label", "message"), [(CLASSES, f"label {CLASSES} is out of range, expected 0 to {CLASSES - 1}"), (-1, "label -1")]
)
def test_a_pixels_label_out_of_range_is_refused_before_the_first_step(label: int, message: str) -> None:
    x, y = images().tensors
    y[0, 2, 2] = label
    student, teacher = made(Pixels, 8, 0), made(Pixels, 9, 1)
    module = DistillationModule(student, teacher, {"kd": KD(2.0)}, sgd, check_teacher=False)
    with pytest.raises(ValueError, match=message):
        trainer().fit(module, DataLoader(TensorDataset(x, y), batch_size=4))


def test_probabilities_of_each_pixel_are_no_logits() -> None:
    class Softened(Pixels):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    module = DistillationModule(made(Pixels, 4, 0), Softened(4), {"kd": KD()}, sgd, check_teacher=False)
    with pytest.raises(ValueError, match="expected logits from the teacher, got probabilities"):
        trainer().fit(module, DataLoader(images(), batch_size=4))


class Anything(DistillationLoss):
    needs_same_classes = False

    def forward(self, student, teacher, target):
        return student.logits.square().mean() + teacher.logits.square().mean()


def test_other_classes_are_refused_only_by_a_loss_that_compares_them() -> None:
    teacher = network(seed=1, classes=7)
    losses = {"hint": Hint("stem"), "anything": Anything(), "hard_label": HardLabel()}
    fit = trainer(max_epochs=1)
    fit.fit(DistillationModule(network(), teacher, losses, sgd, check_teacher=False), loader(), loader())
    assert "val/acc" in fit.callback_metrics
    assert "val/agreement" not in fit.callback_metrics  # there is nothing to agree on
    with pytest.raises(ValueError, match=r"4 classes and the teacher 7, expected the same.*as losses \['kd'\] compare"):
        trainer().fit(DistillationModule(network(), teacher, {**losses, "kd": KD()}, sgd), loader())
