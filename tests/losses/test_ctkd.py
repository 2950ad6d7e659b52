import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from kd_lightning import Distillation, Outputs
from kd_lightning.callbacks import HyperparameterSchedule
from kd_lightning.losses import DKD, KD, MLKD, CurriculumTemperature, DistillationLoss, HardLabel, dkd, kd
from kd_lightning.schedules import cosine, linear
from tests.losses.reference import numerical_gradient, softmax, wave
from tests.tiny import assert_equal, distillation, good_teacher, loader, logged, network, sgd, trainer, weights

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def temperature_at(theta: float, minimum: float = 1.0, span: float = 20.0) -> float:
    return minimum + span / (1 + math.exp(-theta))


def kd_by_loops(temperature: float) -> float:
    total = 0.0
    for s, t in zip(STUDENT.tolist(), TEACHER.tolist(), strict=True):
        soft_s, soft_t = softmax(s, temperature), softmax(t, temperature)
        total += sum(q * math.log(q / p) for p, q in zip(soft_s, soft_t, strict=True))
    return temperature**2 * total / len(STUDENT)


def value(loss: CurriculumTemperature, student: Tensor = STUDENT) -> Tensor:
    return loss(Outputs(student), Outputs(TEACHER), None)


class Labelled(DistillationLoss):
    """A loss that needs everything that one can need."""

    needs_labels = needs_sample_ids = compares_samples = changes_student = True
    takes_top_k = needs_teacher_network = True
    needs_same_classes = needs_teacher = over_classes = False
    min_batch_size = 5

    def __init__(self) -> None:
        super().__init__(student_layers=["a"], teacher_layers=["b"], gather=True)
        self.temperature = 4.0
        self.seen: list[object] = []

    def build(self, student, teacher) -> None:
        self.seen += [student, teacher]

    def attach(self, student, teacher) -> None:
        self.seen += [student, teacher]

    def forward(self, student, teacher, target) -> Tensor:
        return 0.0 * student.logits.sum()


def test_the_temperature_starts_at_15_62() -> None:
    loss = CurriculumTemperature(KD())
    assert loss.theta.item() == 1
    assert loss.temperature.item() == pytest.approx(15.62, abs=0.005)
    assert not loss.temperature.requires_grad


@pytest.mark.parametrize(("minimum", "span"), [(1.0, 20.0), (0.5, 4.0)])
@pytest.mark.parametrize("theta", [-3.0, 0.0, 1.0])
def test_the_value_is_the_other_losss_at_the_learnt_temperature(minimum: float, span: float, theta: float) -> None:
    loss = CurriculumTemperature(KD(temperature=2.0), minimum=minimum, span=span).double()
    nn.init.constant_(loss.theta, theta)
    expected = temperature_at(theta, minimum, span)
    assert loss.temperature.item() == pytest.approx(expected, rel=1e-12)
    assert value(loss).item() == pytest.approx(kd_by_loops(expected), rel=1e-12)


def test_any_loss_that_softens_by_its_temperature_can_be_wrapped() -> None:
    loss = CurriculumTemperature(DKD(alpha=1.0, beta=8.0, temperature=2.0), minimum=2.0, span=4.0).double()
    assert loss.needs_labels
    labels = torch.arange(8)
    found = loss(Outputs(STUDENT), Outputs(TEACHER), labels)
    at = [
        dkd(STUDENT, TEACHER, labels, alpha=1.0, beta=8.0, temperature=temperature_at(x, 2.0, 4.0))
        for x in (1, 1.001, 0.999)
    ]
    assert found.item() == pytest.approx(at[0].item(), rel=1e-12)
    found.backward()
    assert loss.theta.grad.item() == pytest.approx(-(at[1] - at[2]).item() / 0.002, rel=1e-5)


@pytest.mark.parametrize("strength", [0.25, 1.0, 3.0])
def test_the_gradient_that_reaches_theta_is_the_true_one_turned_round(strength: float) -> None:
    loss = CurriculumTemperature(KD(), strength=strength).double()
    value(loss).backward()
    true = numerical_gradient(
        lambda theta: kd_by_loops(temperature_at(theta.item())), torch.ones((), dtype=torch.double)
    )
    assert abs(true.item()) > 1e-3
    assert loss.theta.grad.item() == pytest.approx(-strength * true.item(), rel=1e-6)


def test_the_students_gradient_is_right_and_none_is_the_teachers() -> None:
    loss, teacher = CurriculumTemperature(KD(), strength=2.0).double(), TEACHER.clone().requires_grad_()
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(Outputs(s), Outputs(TEACHER), None), student)
    loss(Outputs(student), Outputs(teacher), None).backward()
    assert teacher.grad is None
    [expected] = torch.autograd.grad(kd(student, TEACHER, temperature=loss.temperature), student)
    torch.testing.assert_close(student.grad, expected)


def test_the_part_that_is_not_turned_round_is_right() -> None:
    theta = torch.ones((), dtype=torch.double, requires_grad=True)
    inputs = STUDENT.clone().requires_grad_(), theta
    assert torch.autograd.gradcheck(lambda s, x: kd(s, TEACHER, temperature=1 + 20 * torch.sigmoid(x)), inputs)


@pytest.mark.parametrize("theta", [-2.0, 0.0, 1.0])
def test_a_step_of_theta_raises_the_loss_and_one_of_the_student_lowers_it(theta: float) -> None:
    loss, student = CurriculumTemperature(KD()).double(), STUDENT.clone().requires_grad_()
    nn.init.constant_(loss.theta, theta)
    before = value(loss, student)
    before.backward()
    torch.optim.SGD([loss.theta], lr=0.01).step()
    assert value(loss, student).item() > before.item()
    nn.init.constant_(loss.theta, theta)
    torch.optim.SGD([student], lr=0.01).step()
    assert value(loss, student).item() < before.item()


def test_strength_0_leaves_theta_where_it_is() -> None:
    loss = CurriculumTemperature(KD(), strength=0.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=10.0, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        value(loss).backward()
        optimizer.step()
    assert loss.theta.grad.item() == 0
    assert loss.theta.item() == 1


def test_a_strength_that_is_scheduled_below_0_is_stopped() -> None:
    callbacks = [HyperparameterSchedule("losses.ctkd.strength", linear(0.0, -1.0))]
    module = distillation(losses={"ctkd": CurriculumTemperature(KD())})
    with pytest.raises(ValueError, match=r"expected strength >= 0, got -0\.5"):
        trainer(callbacks=callbacks).fit(module, loader(16))


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]])
    loss = CurriculumTemperature(KD())
    result = loss(Outputs(student), Outputs(teacher), None)
    result.backward()
    temperature = loss.temperature.item()
    assert result.item() == pytest.approx(temperature**2 * 2e4 / temperature / 2, rel=1e-5)
    assert student.grad.isfinite().all()
    # The loss is 1e4·T, and T grows with theta at ΔT·σ(1)·(1 − σ(1)) = 3.93.
    assert loss.theta.grad.item() == pytest.approx(-1e4 * 3.93, rel=1e-3)


def test_zero_with_gradients_of_zero_where_the_student_equals_the_teacher_and_where_nothing_counts() -> None:
    loss, student = CurriculumTemperature(KD()).double(), STUDENT.clone().requires_grad_()
    tokens = Outputs(student.reshape(2, 4, 10)), Outputs(TEACHER.reshape(2, 4, 10)), torch.full((2, 4), -100)
    for arguments in ((Outputs(student), Outputs(STUDENT), None), tokens):
        student.grad = loss.theta.grad = None
        result = loss(*arguments)
        result.backward()
        assert result.item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT), rtol=0, atol=1e-12)
        assert loss.theta.grad.item() == pytest.approx(0, abs=1e-12)


def test_theta_has_a_gradient_where_the_other_loss_computes_nothing() -> None:
    loss = CurriculumTemperature(Labelled())
    loss(Outputs(STUDENT.clone().requires_grad_()), Outputs(TEACHER), None).backward()
    assert loss.theta.grad.item() == 0


@settings(max_examples=25)
@given(samples=st.permutations(range(8)), classes=st.permutations(range(10)), shift=st.floats(-20, 20))
def test_order_and_a_common_shift_change_nothing(samples: list[int], classes: list[int], shift: float) -> None:
    loss = CurriculumTemperature(KD()).double()
    shuffled = loss(Outputs(STUDENT[samples][:, classes] + shift), Outputs(TEACHER[samples][:, classes]), None)
    assert shuffled.item() == pytest.approx(value(loss).item(), rel=1e-9)


def test_what_the_other_loss_needs_is_passed_on() -> None:
    inner = Labelled()
    loss = CurriculumTemperature(inner, weight=0.5)
    names = ("needs_labels", "needs_sample_ids", "compares_samples", "changes_student", "gather", "needs_same_classes")
    more = ("takes_top_k", "over_classes", "needs_teacher_network")
    for name in (*names, *more, "needs_teacher", "min_batch_size", "student_layers", "teacher_layers"):
        assert getattr(loss, name) == getattr(inner, name), name
    assert loss.weight == 0.5
    networks = nn.Linear(1, 1), nn.Linear(1, 1)
    loss.build(Outputs(STUDENT), Outputs(TEACHER))
    loss.attach(*networks)
    assert [id(x) for x in inner.seen[2:]] == [id(x) for x in networks]
    assert [x.logits is y for x, y in zip(inner.seen[:2], (STUDENT, TEACHER), strict=True)] == [True, True]


def test_after_a_step_the_loss_can_be_copied_and_pickled() -> None:
    loss = CurriculumTemperature(KD()).double()
    value(loss).backward()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert value(other).item() == value(loss).item()


class Notes(Callback):
    """What the logger should have got."""

    def __init__(self) -> None:
        self.thetas: list[float] = []
        self.strengths: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.thetas.append(pl_module.losses.ctkd.theta.item())
        self.strengths.append(pl_module.losses.ctkd.strength)


def test_a_fit_trains_theta_saves_it_and_logs_the_temperature(tmp_path: Path) -> None:
    notes = Notes()
    callbacks = [HyperparameterSchedule("losses.ctkd.strength", cosine(0.0, 1.0)), notes]
    options = {"callbacks": callbacks, "logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    fit = trainer(max_epochs=2, enable_checkpointing=False, **options)
    module = distillation(losses={"hard_label": HardLabel(), "ctkd": CurriculumTemperature(KD())})
    fit.fit(module, loader(24))
    theta = module.losses.ctkd.theta
    [group] = fit.optimizers[0].param_groups
    assert any(p is theta for p in group["params"])

    assert notes.strengths == pytest.approx([(1 - math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    assert notes.thetas[:2] == [1.0, 1.0]  # strength 0 in the first step
    assert len(set(notes.thetas[1:])) == 5
    found = list(logged(tmp_path)["kd/temperature"].values())
    assert found == pytest.approx([temperature_at(theta) for theta in notes.thetas], rel=1e-6)

    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["losses"]["losses.ctkd.theta"].item() == theta.item() != 1
    assert not any("theta" in name for name in saved["state_dict"])


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch, _) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def test_the_callback_around_a_plain_module_trains_theta_and_resumes_it(tmp_path: Path) -> None:
    def run(resume: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module = Plain()
        distil = Distillation(good_teacher(), {"ctkd": CurriculumTemperature(KD())}, student="net")
        saving = [] if resume else [ModelCheckpoint(tmp_path, save_top_k=-1)]
        callbacks = [distil, HyperparameterSchedule("losses.ctkd.strength", linear(0.0, 1.0)), *saving]
        fit = trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
        fit.fit(module, loader(24), ckpt_path=resume, weights_only=True)
        return weights(module), weights(distil.objective)

    student, losses = run()
    assert losses["losses.ctkd.theta"].item() != 1
    again = run(str(tmp_path / "epoch=0-step=3.ckpt"))
    assert_equal(again[0], student)
    assert_equal(again[1], losses)


def test_the_temperature_of_the_other_loss_is_not_scheduled() -> None:
    fit = trainer(callbacks=[HyperparameterSchedule("losses.ctkd.loss.temperature", linear(8, 1))])
    with pytest.raises(ValueError, match=r"'losses\.ctkd\.loss\.temperature' leads to a Tensor, expected a number"):
        fit.fit(distillation(losses={"ctkd": CurriculumTemperature(KD())}), loader())


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (HardLabel(), {}, "expected a loss with a temperature, got HardLabel: wrap for instance"),
        (MLKD(), {}, "expected a loss with a temperature, got MLKD"),
        (KD(weight=0.9), {}, r"expected a loss of weight 1, got 0\.9: pass the weight to CurriculumTemperature"),
        (KD(), {"minimum": 0.0}, r"expected minimum > 0 and span > 0, got 0\.0 and 20\.0"),
        (KD(), {"span": -20.0}, r"expected minimum > 0 and span > 0, got 1\.0 and -20\.0"),
        (KD(), {"strength": -1.0}, r"expected strength >= 0, got -1\.0"),
        (KD(), {"weight": -1.0}, r"expected weight >= 0, got -1\.0"),
    ],
)
def test_wrong_arguments_are_refused(loss: DistillationLoss, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumTemperature(loss, **options)
