"""An ensemble's probabilities are averaged at the temperature of each loss, not its logits."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from kd_lightning import Distillation, Teacher
from kd_lightning.callbacks import TemperatureSchedule
from kd_lightning.losses import DIST, KD, CurriculumTemperature, DeiTHard, HardLabel, Hint, LogitsMSE, kd
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import EnsembleOutputs, Outputs, PeerOutputs, TopK, classes_last, mixed
from kd_lightning.schedules import linear
from kd_lightning.tasks import Batch, Classification, Embedding, Task
from kd_lightning.tasks.base import relative_entropy
from kd_lightning.teachers import Ensemble, FromBatch, Momentum
from tests.losses.reference import softmax, wave
from tests.tiny import (
    CLASSES,
    assert_equal,
    distillation,
    good_teacher,
    loader,
    network,
    samples,
    sgd,
    trainer,
    weights,
)

X, Y = samples(8)
BATCH = Batch((X,), {}, Y)


def pair() -> list[nn.Module]:
    return [good_teacher(), network(3, width=5)]


def by_loops(members: list[list[list[float]]], weights: list[float], temperature: float) -> list[list[float]]:
    """For each sample the average of the members' softened probabilities."""
    softened = [[softmax(row, temperature) for row in rows] for rows in members]
    return [
        [sum(w * p[i][c] for w, p in zip(weights, softened, strict=True)) for c in range(len(members[0][0]))]
        for i in range(len(members[0]))
    ]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("parts", [[1.0, 1.0], [3.0, 1.0], [0.0, 2.0]])
def test_softmax_of_its_logits_at_t_is_the_average_of_the_probabilities_at_t(temperature: float, parts: list) -> None:
    ensemble = Ensemble(pair(), parts)
    logits = [Teacher(member)(BATCH).logits.double() for member in pair()]
    given = ensemble(BATCH).softened(temperature)
    expected = by_loops([z.tolist() for z in logits], [part / sum(parts) for part in parts], temperature)
    torch.testing.assert_close(
        (given.logits.double() / temperature).softmax(-1).tolist(), expected, rtol=1e-5, atol=1e-6
    )


def test_it_is_not_the_average_of_the_logits() -> None:
    z = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = mixed(z, (0.5, 0.5)).softmax(-1)
    assert p[0, 0].item() == pytest.approx(0.5 * (1 / (1 + math.exp(-4)) + 0.5), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 5, 2, 2)])
def test_vectors_tokens_and_pixels(shape: tuple[int, ...]) -> None:
    one, other = wave(shape, 1.3, 0.1), wave(shape, 0.4, 0.9)
    found = classes_last(mixed((one, other), (0.25, 0.75), 2.0) / 2).softmax(-1)
    expected = 0.25 * (classes_last(one) / 2).softmax(-1) + 0.75 * (classes_last(other) / 2).softmax(-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite_and_half_precision_is_mixed_in_float32(dtype: torch.dtype) -> None:
    one = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    found = EnsembleOutputs.of((one, -one), (0.5, 0.5)).logits
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.softmax(-1), torch.tensor([[0.5, 0.5, 0.0]]))
    assert mixed((torch.tensor([[0.0, -torch.inf]]),) * 2, (0.5, 0.5)).tolist() == [[0.0, -math.inf]]


def test_each_loss_gets_the_average_at_its_own_temperature() -> None:
    student, given = Outputs(wave((8, CLASSES), 0.7, 0.1).float()), Ensemble(pair())(BATCH)
    curriculum = CurriculumTemperature(KD())
    losses = {"warm": KD(4.0), "cool": KD(2.0), "mse": LogitsMSE(), "hard": DeiTHard(), "learnt": curriculum}
    terms = DistillationObjective(losses)(student, given, None)[1]

    def expected(temperature: float) -> Tensor:
        return kd(student.logits, mixed(given.members, given.weights, temperature), temperature=temperature)

    assert torch.equal(terms["warm"].raw, expected(4.0))
    assert torch.equal(terms["cool"].raw, expected(2.0))
    torch.testing.assert_close(terms["learnt"].raw, expected(float(curriculum.temperature)))
    for name in ("mse", "hard"):
        alone = DistillationObjective({"it": losses[name]})(student, Outputs(given.logits), None)[0]
        assert torch.equal(terms[name].raw, alone)


def test_an_ensemble_of_one_is_that_one() -> None:
    student = Outputs(wave((8, CLASSES), 0.7, 0.1).float())
    objective = DistillationObjective({"kd": KD(4.0), "dist": DIST(temperature=2.0)})
    one = objective(student, Ensemble([good_teacher()])(BATCH), None)[0]
    torch.testing.assert_close(one, objective(student, Teacher(good_teacher())(BATCH), None)[0])


def test_layers_and_the_network_are_the_first_members() -> None:
    ensemble = Ensemble(pair())
    assert torch.equal(
        ensemble(BATCH, ["act"]).features["act"], Teacher(good_teacher())(BATCH, ["act"]).features["act"]
    )
    assert ensemble.network is ensemble.teachers[0].network


def test_all_members_are_frozen_and_move() -> None:
    ensemble = Ensemble(pair())
    ensemble.to(torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for t in ensemble.teachers for p in t.network.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for t in ensemble.teachers for p in t.network.parameters())


def test_with_the_classes_in_the_second_dimension_it_is_that_of_their_probabilities_too() -> None:
    one, other = wave((2, 3, 5), 1.3, 0.1), wave((2, 3, 5), 0.4, 0.9)
    expected = mixed((one, other), (0.5, 0.5))
    given = EnsembleOutputs.of((one.movedim(-1, 1), other.movedim(-1, 1)), (0.5, 0.5))
    arranged = Classification(class_dim=1).arranged(given)
    torch.testing.assert_close(arranged.logits, expected)
    torch.testing.assert_close(arranged.softened(2.0).logits, mixed((one, other), (0.5, 0.5), 2.0))


class Values(Task):
    """Outputs are values, of which a task says what their average is."""

    over_classes = False

    def average(self, members: Any, weights: Any, temperature: float) -> Tensor:
        return sum(w * z for w, z in zip(weights, members, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        EnsembleOutputs.of((torch.tensor([[1.0]]), torch.tensor([[4.0]])), (0.5, 0.5)),
        PeerOutputs({"b": Outputs(torch.tensor([[1.0]])), "c": Outputs(torch.tensor([[4.0]]))}),
    ],
)
def test_what_is_no_class_is_averaged_as_the_task_says_or_refused(given: Any) -> None:
    """The softmax of a single output is 1: its logits would be 0, whatever the teachers say."""
    arranged = Values().arranged(given)
    assert arranged.logits.tolist() == arranged.softened(4.0).logits.tolist() == [[2.5]]
    with pytest.raises(ValueError, match="Embedding has no average of several teachers' outputs: take one of them"):
        _ = Embedding().arranged(given).logits


def test_one_alone_needs_no_average() -> None:
    alone = PeerOutputs({"b": Outputs(torch.tensor([[7.0]]))})
    assert Embedding().arranged(alone).softened(4.0).logits.tolist() == [[7.0]]


# Through both front doors.


class Existing(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return sgd(self.parameters())


def through_module(teacher: Any, losses: dict, **options: Any) -> tuple[dict, Any]:
    module, fit = distillation(teacher=teacher, losses={"hard_label": HardLabel(), **losses}), trainer(**options)
    torch.manual_seed(0)
    fit.fit(module, loader(), loader(seed=5))
    return weights(module.student), fit


def through_callback(teacher: Any, losses: dict, **options: Any) -> tuple[dict, Any]:
    module, callbacks = Existing(), options.pop("callbacks", [])
    fit = trainer(callbacks=[Distillation(teacher, losses, student="net"), *callbacks], **options)
    torch.manual_seed(0)
    fit.fit(module, loader(), loader(seed=5))
    return weights(module.net), fit


DOORS = pytest.mark.parametrize("door", [through_module, through_callback])


@DOORS
def test_it_teaches_what_a_hand_written_loop_teaches(door: Any) -> None:
    """With a temperature that is scheduled."""
    got, _ = door(Ensemble(pair(), [2, 1]), {"kd": KD()}, callbacks=[TemperatureSchedule(linear(8.0, 2.0))])
    student, teachers = network(), [member.eval() for member in pair()]
    optimizer = sgd(student.parameters())
    for i, (x, y) in enumerate(loader()):
        temperature = 8.0 - 6.0 * i / 4
        with torch.no_grad():
            p = sum(w * (t(x) / temperature).softmax(-1) for w, t in zip((2 / 3, 1 / 3), teachers, strict=True))
        z = student(x)
        divergence = (p * (p.log() - (z / temperature).log_softmax(-1))).sum(-1).mean()
        optimizer.zero_grad()
        (nn.functional.cross_entropy(z, y) + temperature**2 * divergence).backward()
        optimizer.step()
    torch.testing.assert_close(got["head.weight"], student.head.weight.detach(), rtol=1e-4, atol=1e-5)


@DOORS
def test_what_is_logged(door: Any, tmp_path) -> None:
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "max_epochs": 2}
    _, fit = door(Ensemble(pair()), {"kd": KD(3.0), "hint": Hint("act")}, **options)
    x, y = samples(32, seed=5)
    members = [Teacher(member)(Batch((x,), {}, None)).logits for member in pair()]
    mean = sum(z.softmax(-1) for z in members) / 2
    expected = {f"val/teacher_acc/{i}": z for i, z in enumerate(members)} | {"val/teacher_acc": mean}
    for name, z in expected.items():
        assert fit.callback_metrics[name] == pytest.approx((z.argmax(-1) == y).float().mean().item())
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/teacher_acc/1")
    assert sum(bool(row.split(",")[column]) for row in rows[1:]) == 1  # once, as it stays the same

    last = list(loader())[-1][0]
    p = sum((Teacher(member)(Batch((last,), {}, None)).logits / 3).softmax(-1) for member in pair()) / 2
    assert fit.logged_metrics["kd/teacher_entropy"].item() == pytest.approx(relative_entropy(p.log()).item(), rel=1e-5)


@DOORS
def test_a_half_precision_training_mixes_in_float32(door: Any) -> None:
    half, full = (door(Ensemble(pair()), {"kd": KD()}, precision=p)[0] for p in ("bf16-mixed", "32-true"))
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)
    assert_equal(door(Ensemble(pair()), {"kd": KD()})[0], full)


# Refused


@DOORS
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: network(classes=3), r"teacher 1 of the ensemble gives logits \(2, 3\) and teacher 0 \(2, 4\)"),
        (
            lambda: nn.Sequential(network(), nn.Softmax(-1)),
            r"expected logits from the teacher 1 of the ensemble, got pr",
        ),
        (lambda: Ensemble(pair()), "teacher 1 of the ensemble gives an ensemble of its own, expected logits"),
        (FromBatch, "the batch brings no outputs of a teacher"),
    ],
)
def test_members_that_do_not_fit_are_refused_before_training(door: Any, other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        door(Ensemble([good_teacher(), other()]), {"kd": KD()})


def test_members_of_which_only_the_best_classes_are_known_are_refused() -> None:
    best = TopK.of(torch.zeros(8, 1), torch.zeros(8, 1))
    with pytest.raises(ValueError, match="teacher 1 of the ensemble gives its best classes, expected logits of all"):
        Ensemble([good_teacher(), FromBatch()])(BATCH._replace(teacher=best))


@pytest.mark.parametrize("parts", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_weights_that_do_not_fit_are_refused(parts: list[float]) -> None:
    with pytest.raises(ValueError, match="expected a weight >= 0 for each of 2 teachers"):
        Ensemble(pair(), parts)
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        Ensemble([])


def test_a_member_that_learns_is_refused() -> None:
    with pytest.raises(ValueError, match="expected teachers that stay as they are, got one that learns"):
        Ensemble([good_teacher(), Momentum()])


def test_a_batch_that_a_member_has_no_outputs_for_is_not_taught() -> None:
    ensemble = Ensemble([good_teacher(), FromBatch()])
    assert not ensemble.can_teach(BATCH)
    taught = Classification().read((X, Y, wave((8, CLASSES), 1.0, 0.1).float()))
    assert ensemble.can_teach(taught)
    assert ensemble(taught).logits.shape == (8, CLASSES)
