import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from kd_lightning import DistillationModule, Teacher, load_student
from kd_lightning.losses import KD, HardLabel, Hint, hard_label, kd
from tests.losses.reference import softmax
from tests.tiny import (
    CLASSES,
    assert_equal,
    distillation,
    good_teacher,
    loader,
    logged,
    network,
    samples,
    sgd,
    trainer,
    weights,
)


class Watch(Callback):
    """Notes the student's weights before each batch, and the batch."""

    def __init__(self) -> None:
        self.before: list[tuple[dict[str, Tensor], list[Tensor]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before.append((weights(pl_module.student), batch))


# What is logged


def test_every_value_is_logged_under_its_name_and_right(tmp_path) -> None:
    module, watch = distillation(), Watch()
    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[watch], max_epochs=2)
    fit.fit(module, loader(24))
    values = logged(tmp_path)
    assert set(values) == {
        "train/loss",
        "train/loss/hard_label",
        "train/loss/kd",
        "train/loss_weighted/hard_label",
        "train/loss_weighted/kd",
        "train/grad_norm/hard_label",
        "train/grad_norm/kd",
        "train/samples_per_s",
        "train/teacher_share",
        "train/peak_memory_mb",
        "kd/temperature",
        "kd/teacher_entropy",
    }
    assert set(values["train/loss"]) == set(range(6))
    for step, (before, (x, y)) in enumerate(watch.before):
        student, teacher = network().train(), good_teacher().eval()
        student.load_state_dict(before)
        with torch.no_grad():
            z_s, z_t = student(x), teacher(x)
        hard, soft = hard_label(z_s, y).item(), kd(z_s, z_t, temperature=4.0).item()
        expected = {
            "train/loss/hard_label": hard,
            "train/loss/kd": soft,
            "train/loss_weighted/hard_label": 0.3 * hard,
            "train/loss_weighted/kd": 0.7 * soft,
            "train/loss": 0.3 * hard + 0.7 * soft,
            "kd/temperature": 4.0,
            "kd/teacher_entropy": relative_entropy(z_t, 4.0),
        }
        assert {name: values[name][step] for name in expected} == pytest.approx(expected, rel=1e-5)


def relative_entropy(logits: Tensor, temperature: float) -> float:
    rows = [softmax(row, temperature) for row in logits.tolist()]
    return -sum(p * math.log(p) for row in rows for p in row) / len(rows) / math.log(len(rows[0]))


@pytest.mark.parametrize("every", [1, 2])
def test_it_is_logged_at_the_steps_that_the_trainer_says(tmp_path, every: int) -> None:
    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=3, accumulate_grad_batches=every, max_epochs=2)
    fit.fit(distillation(), loader(48 * every))
    assert list(logged(tmp_path)["train/loss/kd"]) == [2, 5, 8, 11]


def test_two_temperatures_are_told_apart(tmp_path) -> None:
    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1)
    fit.fit(distillation(losses={"soft": KD(4.0), "sharp": KD(1.0)}), loader(8))
    values = logged(tmp_path)
    assert values["kd/temperature/soft"] == {0: 4.0}
    assert values["kd/temperature/sharp"] == {0: 1.0}
    assert "kd/temperature" not in values


# The teacher


def test_the_teacher_is_in_none_of_the_modules_collections() -> None:
    teacher = good_teacher()
    module = distillation(teacher=teacher)
    theirs = {id(p) for p in (*teacher.parameters(), *teacher.buffers())}
    assert not theirs & {id(p) for p in (*module.parameters(), *module.buffers())}
    assert not any(part is teacher for part in module.modules())
    assert set(module.state_dict()) == {"student." + name for name in network().state_dict()}
    fit = trainer()
    fit.fit(module, loader())
    assert not theirs & {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}


def test_the_teacher_stays_as_it_was_while_the_student_trains() -> None:
    teacher, modes = good_teacher(dropout=0.5), []
    before = weights(teacher)
    module = distillation(network(dropout=0.5), teacher=teacher)

    class Modes(Callback):
        def on_train_batch_end(self, *_) -> None:
            modes.append((teacher.training, teacher.norm.training, module.student.drop.training))

    start = weights(module.student)
    trainer(max_epochs=2, callbacks=[Modes()]).fit(module, loader(), loader())
    assert_equal(weights(teacher), before)
    assert set(modes) == {(False, False, True)}
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(not torch.equal(value, start[name]) for name, value in weights(module.student).items())


class Note(nn.Module):
    """Remembers its inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.inner(x)


def test_both_networks_get_the_very_same_tensor() -> None:
    """So they see the same crop and the same mixup, whatever made it."""
    student, teacher = Note(network()), Note(good_teacher())
    module = distillation(student, teacher=teacher, check_teacher=False)

    class Augment(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            student.seen.clear()
            teacher.seen.clear()
            batch[0] += torch.randn_like(batch[0])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            assert len(student.seen) == len(teacher.seen) == 1
            assert student.seen[0] is teacher.seen[0] is batch[0]

    trainer(callbacks=[Augment()]).fit(module, loader())


def test_a_plain_network_is_wrapped_as_a_teacher() -> None:
    assert isinstance(distillation(teacher=good_teacher()).teacher, Teacher)


def test_a_teacher_that_no_loss_needs_is_asked_in_validation_only() -> None:
    teacher = Note(good_teacher())
    module = distillation(teacher=teacher, losses={"hard_label": HardLabel()}, check_teacher=False)
    calls = []

    class Count(Callback):
        def on_train_epoch_start(self, *_) -> None:
            teacher.seen.clear()

        def on_validation_start(self, *_) -> None:
            calls.append(len(teacher.seen))

    trainer(callbacks=[Count()], num_sanity_val_steps=0).fit(module, loader(), loader())
    assert calls == [0]
    assert len(teacher.seen) == 4


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_teacher_follows_the_students_precision(precision: str) -> None:
    module = distillation(losses={"hard_label": HardLabel(), "kd": KD(), "hint": Hint("stem")})
    trainer(precision=precision).fit(module, loader(), loader())
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {p.dtype for p in module.teacher.network.parameters()} == {dtype}
    assert {p.dtype for p in module.student.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in module.student.parameters())


# The student


def test_forward_is_the_students() -> None:
    module, (x, _) = distillation().eval(), samples(5)
    assert torch.equal(module(x), module.student(x))
    assert torch.equal(module(x=x), module.student(x))


def test_predictions_are_the_students_logits() -> None:
    module = distillation()
    (first, *_) = trainer().predict(module, DataLoader(samples(8)[0], batch_size=8))
    torch.testing.assert_close(first, module.student.eval()(samples(8)[0]))


def test_one_step_is_the_bare_torch_step() -> None:
    module, plain, teacher = distillation(), network().train(), good_teacher().eval()
    trainer(max_epochs=2).fit(module, loader())
    optimizer = sgd(plain.parameters())
    for _ in range(2):
        for x, y in loader():
            with torch.no_grad():
                z_t = teacher(x)
            z_s = plain(x)
            loss = 0.3 * hard_label(z_s, y) + 0.7 * kd(z_s, z_t, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_equal(weights(module.student), weights(plain))


def test_a_student_alone() -> None:
    module = distillation(teacher=None, losses={"hard_label": HardLabel()})
    trainer().fit(module, loader(), loader())
    plain = network().train()
    optimizer = sgd(plain.parameters())
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    # The mean is a sum divided here, and cross_entropy's own there.
    torch.testing.assert_close(weights(module.student), weights(plain), rtol=1e-5, atol=1e-6)


def test_frozen_parameters_of_the_student_stay() -> None:
    student = network()
    student.stem.requires_grad_(False)
    before = student.stem.weight.clone()
    fit = trainer()
    fit.fit(distillation(student), loader())
    assert torch.equal(student.stem.weight, before)
    assert student.stem.weight not in set(fit.optimizers[0].param_groups[0]["params"])


def test_projectors_are_trained() -> None:
    module, start = distillation(losses={"kd": KD(), "hint": Hint("stem")}), []

    class First(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            start.append(weights(pl_module.objective))

    trainer(callbacks=[First()]).fit(module, loader())
    assert all(not torch.equal(value, start[0][name]) for name, value in weights(module.objective).items())
    assert module.losses.hint.projector.weight.shape == (16, 8)


# Validation


def expected_scores(student: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    z_s, z_t = student.eval()(x), good_teacher().eval()(x)
    labelled = y != -100
    ece = partial(multiclass_calibration_error, num_classes=CLASSES, n_bins=15)
    return {
        "acc": (z_s.argmax(-1) == y)[labelled].float().mean().item(),
        "ece": ece(z_s[labelled], y[labelled]).item(),
        "teacher_ece": ece(z_t[labelled], y[labelled]).item(),
        "kl_teacher": F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean").item(),
        "agreement": (z_s.argmax(-1) == z_t.argmax(-1)).float().mean().item(),
        "teacher_acc": (z_t.argmax(-1) == y)[labelled].float().mean().item(),
    }


def test_scores_count_samples_and_not_batches_with_unlabelled_ones_and_a_small_last_batch() -> None:
    x, y = samples(43, seed=5)
    y[:11], y[40] = -100, -100  # the first batch has no label at all
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    module = distillation(network(3))
    (scores,) = trainer().validate(module, data, verbose=False)
    expected = expected_scores(module.student, x, y)
    assert scores == pytest.approx({"val/" + name: value for name, value in expected.items()}, rel=1e-5)
    (scores,) = trainer().test(module, data, verbose=False)
    del expected["teacher_acc"], expected["teacher_ece"]
    assert scores == pytest.approx({"test/" + name: value for name, value in expected.items()}, rel=1e-5)


def test_scores_of_each_epoch_are_its_own_and_the_teachers_is_logged_once(tmp_path) -> None:
    module, expected = distillation(), []

    class Score(Callback):
        def on_validation_start(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking:
                copy = network()
                copy.load_state_dict(weights(pl_module.student))
                expected.append(expected_scores(copy, *samples(20, seed=4)))

    fit = trainer(max_epochs=3, logger=CSVLogger(tmp_path), callbacks=[Score()], log_every_n_steps=1)
    fit.fit(module, loader(), loader(20, seed=4))
    values = logged(tmp_path)
    for name in ("acc", "agreement", "ece", "kl_teacher"):
        assert list(values["val/" + name].values()) == pytest.approx([e[name] for e in expected], rel=1e-5)
    assert list(values["val/teacher_acc"].values()) == pytest.approx([expected[0]["teacher_acc"]], rel=1e-6)


def test_without_labels_agreement_is_still_measured() -> None:
    module = distillation(losses={"kd": KD()})
    x, y = samples(20, seed=4)
    (scores,) = trainer().validate(module, DataLoader(x, batch_size=8), verbose=False)
    expected = expected_scores(module.student, x, y)
    of_both = {f"val/{name}": pytest.approx(expected[name], rel=1e-5) for name in ("agreement", "kl_teacher")}
    assert scores == of_both


def test_without_a_teacher_accuracy_alone() -> None:
    module = distillation(teacher=None, losses={"hard_label": HardLabel()})
    (scores,) = trainer().validate(module, loader(), verbose=False)
    assert set(scores) == {"val/acc", "val/ece"}


# Batches and networks of other forms


class Mapped(nn.Module):
    """As Hugging Face's: keyword arguments in, an object with .logits out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(pixel_values), loss=None)


X, Y = samples(16)


@pytest.mark.parametrize(
    ("data", "mapped"),
    [
        ([{"pixel_values": X, "labels": Y}], True),
        ([({"pixel_values": X, "mask": X}, Y)], True),
        ([(X, Y)], False),
        ([(X, Y)], True),
    ],
)
def test_batches_of_any_form_train_the_same(data: list, mapped: bool) -> None:
    student = Mapped(network()) if mapped else network()
    teacher = Mapped(good_teacher()) if mapped else good_teacher()
    module, reference = distillation(student, teacher=teacher), distillation()
    trainer(max_epochs=2).fit(module, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None))
    trainer(max_epochs=2).fit(reference, DataLoader([(X, Y)], batch_size=None))
    assert_equal(weights(student.inner if mapped else student), weights(reference.student))


def test_unlabelled_tensors_are_distilled_on() -> None:
    module, reference = distillation(losses={"kd": KD()}), distillation(losses={"kd": KD()})
    trainer().fit(module, DataLoader(X, batch_size=8))
    trainer().fit(reference, DataLoader(TensorDataset(X, Y), batch_size=8))
    assert_equal(weights(module.student), weights(reference.student))


def test_unlabelled_samples_are_distilled_on_beside_labelled_ones() -> None:
    """Half the samples have a label: the task loss is theirs, distillation that of all."""
    half = torch.where(torch.arange(16) % 4 < 2, Y, -100)
    module, watch = distillation(), Watch()
    trainer(callbacks=[watch]).fit(module, DataLoader(TensorDataset(X, half), batch_size=16))
    plain, teacher = network().train(), good_teacher().eval()
    with torch.no_grad():
        z_t = teacher(X)
    z_s, labelled = plain(X), half != -100
    loss = 0.3 * nn.functional.cross_entropy(z_s[labelled], Y[labelled]) + 0.7 * kd(z_s, z_t, temperature=4.0)
    loss.backward()
    sgd(plain.parameters()).step()
    torch.testing.assert_close(weights(module.student), weights(plain), rtol=1e-5, atol=1e-6)


def test_mixed_labels_train() -> None:
    mixed = 0.7 * nn.functional.one_hot(Y, CLASSES).float() + 0.3 * nn.functional.one_hot(Y.flip(0), CLASSES)
    module, before = distillation(), weights(network())
    trainer().fit(module, DataLoader(TensorDataset(X, mixed), batch_size=8), DataLoader(TensorDataset(X, mixed)))
    assert not torch.equal(module.student.head.weight, before["head.weight"])


# Learning rates


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer, *_) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("scheduler", "given"),
    [
        (partial(OneCycleLR, max_lr=0.3), {"total_steps": 6}),
        (CosineAnnealingLR, {"T_max": 6}),
        (partial(CosineAnnealingLR, T_max=4), {}),
        (partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)), {}),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_scheduler_is_stepped_each_optimizer_step_and_knows_how_many_there_are(scheduler, given, every) -> None:
    rates = Rates()
    fit = trainer(max_epochs=2, accumulate_grad_batches=every, callbacks=[rates])
    fit.fit(distillation(scheduler=scheduler), loader(24 * every))
    optimizer = sgd([nn.Parameter(torch.zeros(1))])
    reference, expected = scheduler(optimizer, **given), []
    for step in range(6):
        expected += [optimizer.param_groups[0]["lr"]] * every
        optimizer.step()
        if step < 5:
            reference.step()
    assert rates.rates == pytest.approx(expected, rel=1e-12)


# Together with Lightning's own


@pytest.mark.parametrize("hint", [False, True])
def test_a_moving_average_of_the_student_is_what_the_checkpoint_holds(tmp_path, hint: bool) -> None:
    losses = {"kd": KD(), **({"hint": Hint("stem")} if hint else {})}
    module, average = distillation(losses=losses), EMAWeightAveraging(decay=0.5)
    steps: list[dict[str, Tensor]] = []
    copies = []

    class Steps(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            steps.append(weights(pl_module.student))

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            steps.append(weights(pl_module.student))
            copies.append(average._average_model.module.teacher.network is pl_module.teacher.network)
            trainer.save_checkpoint(tmp_path / f"{len(steps)}.ckpt")

    trainer(callbacks=[average, Steps()]).fit(module, loader(24))
    assert copies == [True] * 3
    first, *later = [step["head.weight"] for step in steps]
    expected = later[0]  # the average begins with the first step
    for value in later[1:]:
        expected = 0.5 * expected + 0.5 * value
    state = load_student(tmp_path / "4.ckpt")
    assert set(state) == set(network().state_dict())
    torch.testing.assert_close(state["head.weight"], expected)
    assert not torch.equal(state["head.weight"], first)
    plain = network()
    plain.load_state_dict(state)

    again = distillation(losses={"kd": KD(), **({"hint": Hint("stem")} if hint else {})})
    fit = trainer(max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    fit.fit(again, loader(24), ckpt_path=tmp_path / "4.ckpt")
    assert fit.global_step == 6


def test_it_is_a_lightning_module_with_the_students_size() -> None:
    module = distillation()
    assert isinstance(module, LightningModule)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in network().parameters())


def test_import_takes_neither_mlflow_nor_hydra_along() -> None:
    code = "import sys, kd_lightning; print({'mlflow', 'hydra', 'omegaconf', 'pandas'} & set(sys.modules) or 'none')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert out.stdout.strip() == "none"


def test_a_loss_that_needs_a_teacher_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match=r"losses \['kd'\] need a teacher, got teacher=None: pass a Teacher"):
        DistillationModule(network(), None, {"hard_label": HardLabel(), "kd": KD()}, sgd)
