import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import FT, factor_transfer
from tests.losses.reference import numerical_gradient, wave
from tests.tiny import distillation, loader, trainer, weights

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, SMALL_TEACHER = STUDENT[:2, :2, :2, :3], TEACHER[:2, :4, :2, :3]


def outputs(feature: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(feature), 2, dtype=feature.dtype), {"layer": feature})


def built(student: Tensor, teacher: Tensor, **options: object) -> FT:
    torch.manual_seed(0)
    loss = FT("layer", **options)
    loss.build(outputs(student), outputs(teacher))
    return loss.double()


def ft_by_loops(student: Tensor, teacher: Tensor, p1: int = 2, p2: int = 1) -> float:
    def factor(sample: list[list[list[float]]]) -> list[float]:
        height, width = len(sample[0]), len(sample[0][0])
        means = [sum(m[i][j] ** p1 for m in sample) / len(sample) for i in range(height) for j in range(width)]
        length = math.sqrt(sum(x * x for x in means))
        return [x / length for x in means]

    total, count = 0.0, 0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        for x, y in zip(factor(s), factor(t), strict=True):
            total, count = total + abs(x - y) ** p2, count + 1
    return total / count


def test_value_of_the_authors() -> None:
    assert factor_transfer(STUDENT, TEACHER, p1=2, p2=1).item() == pytest.approx(0.015312587092054967, rel=1e-12)


@pytest.mark.parametrize("p1", [1, 2, 3])
@pytest.mark.parametrize("p2", [1, 2])
def test_value_and_gradient_equal_the_formula_for_different_widths(p1: int, p2: int) -> None:
    student = SMALL.clone().requires_grad_()
    loss = factor_transfer(student, SMALL_TEACHER, p1=p1, p2=p2)
    loss.backward()
    assert loss.item() == pytest.approx(ft_by_loops(SMALL, SMALL_TEACHER, p1, p2), rel=1e-12)
    expected = numerical_gradient(lambda s: ft_by_loops(s, SMALL_TEACHER, p1, p2), SMALL)
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    student, teacher = SMALL.clone().requires_grad_(), SMALL_TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: factor_transfer(s, SMALL_TEACHER), student)
    factor_transfer(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("p2", [1, 2])
def test_zero_where_the_student_equals_the_teacher(p2: int) -> None:
    student = TEACHER.clone().requires_grad_()
    loss = factor_transfer(student, TEACHER, p2=p2)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@settings(max_examples=25)
@given(
    samples=st.permutations(range(4)),
    channels=st.permutations(range(6)),
    scale=st.floats(0.01, 100),
    sign=st.sampled_from([-1, 1]),
)
def test_order_sign_and_scale_change_nothing(samples, channels, scale: float, sign: int) -> None:
    value = factor_transfer(sign * scale * STUDENT[samples][:, channels], TEACHER[samples], p1=2).item()
    assert value == pytest.approx(factor_transfer(STUDENT, TEACHER).item(), rel=1e-9)


def test_features_of_zero_and_large_ones_have_finite_gradients() -> None:
    for scale in (0.0, 1e4):
        student = (STUDENT[:1] * scale).float().requires_grad_()
        loss = factor_transfer(student, TEACHER[:1].float())
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_the_module_transfers_factors_and_reconstructs_the_teachers_features() -> None:
    student, teacher = wave((2, 3, 4, 6), 0.37, 0.2), wave((2, 5, 4, 6), 0.53, 0.9)
    loss = built(student, teacher, reconstruction_weight=0.3, p2=2)
    factors, translated = loss.encoder(teacher), loss.translator(student)
    assert factors.shape == translated.shape == (2, 2, 4, 6)  # int(0.5 · 5) factors
    rebuilt = loss.decoder(factors)
    expected = ft_by_loops(translated, factors, 2, 2) + 0.3 * ((rebuilt - teacher) ** 2).mean().item()
    assert loss(outputs(student), outputs(teacher), None).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(8, 4), (4, 8)])
def test_the_larger_factors_are_average_pooled(student_size: int, teacher_size: int) -> None:
    student = wave((2, 3, student_size, student_size), 0.3, 0.1)
    teacher = wave((2, 6, teacher_size, teacher_size), 0.7, 0)
    loss = built(student, teacher, reconstruction_weight=0.0)
    factors = [
        x.reshape(2, 3, 4, x.shape[2] // 4, 4, x.shape[3] // 4).mean((3, 5))
        for x in (loss.translator(student), loss.encoder(teacher))
    ]
    assert loss(outputs(student), outputs(teacher), None).item() == pytest.approx(ft_by_loops(*factors), rel=1e-9)


def test_the_parts_are_each_trained_by_their_own_error() -> None:
    student, teacher = STUDENT[:, :3].clone().requires_grad_(), TEACHER.clone().requires_grad_()
    parts = ("translator", "encoder", "decoder")
    for reconstruction_weight, trained in ((0.0, {"translator"}), (1.0, {"translator", "encoder", "decoder"})):
        loss = built(student, teacher, reconstruction_weight=reconstruction_weight)
        loss(outputs(student), outputs(teacher), None).backward()
        moved = {
            name for name in parts for p in getattr(loss, name).parameters() if p.grad is not None and p.grad.any()
        }
        assert moved == trained
        assert teacher.grad is None

    # The student's gradient is that of the transfer alone.
    gradients = []
    for reconstruction_weight in (0.0, 5.0):
        student.grad = None
        loss = built(student, teacher, reconstruction_weight=reconstruction_weight)
        loss(outputs(student), outputs(teacher), None).backward()
        gradients.append(student.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_paraphraser_learns_to_reconstruct() -> None:
    loss = built(STUDENT, TEACHER)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        errors.append(F.mse_loss(loss.decoder(loss.encoder(TEACHER)), TEACHER).item())
        loss(outputs(STUDENT), outputs(TEACHER), None).backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


class Maps(nn.Module):
    """Layers ``stem`` on maps of 2×3 and ``head``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x.reshape(-1, 1, 2, 3)).relu().mean((2, 3)))


def test_a_training_moves_student_translator_and_paraphraser() -> None:
    module = distillation(Maps(3), Maps(4), losses={"ft": FT("stem", weight=10.0)}, check_teacher=False)
    fit, first = trainer(max_steps=1), weights(module.student)
    fit.fit(module, loader())
    before = weights(module.objective)
    fit = trainer(max_steps=3)
    fit.fit(module, loader())
    assert not torch.equal(module.student.stem.weight, first["stem.weight"])
    names = [name for name, _ in module.objective.named_parameters()]
    assert len(names) == 12 + 6 + 6  # three layers each, the translator's with batch normalisation
    for name, parameter in module.objective.named_parameters():
        # Before a batch normalisation a bias changes nothing.
        if not name.endswith(("translator.0.bias", "translator.3.bias", "translator.6.bias")):
            assert not torch.equal(parameter, before[name]), name


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ft: expected maps \(B, C, H, W\), got \(4, 6\)"):
        built(STUDENT, TEACHER[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"factors are \(4, 6, 4, 8\) and the teacher's \(4, 6, 8, 8\), expected maps"):
        factor_transfer(STUDENT[:, :, :4], TEACHER)
    with pytest.raises(ValueError, match=r"factor_transfer: expected maps \(B, C, H, W\), got \(4, 6\)"):
        factor_transfer(STUDENT[:, :, 0, 0], TEACHER)


def test_settings_that_mean_nothing_are_refused() -> None:
    for options in ({"rate": 0.0}, {"p1": 0}, {"p2": 0}):
        with pytest.raises(ValueError, match="expected rate > 0, p1 >= 1 and p2 >= 1, got"):
            FT("layer", **options)
    with pytest.raises(ValueError, match="expected reconstruction_weight >= 0, got -1"):
        FT("layer", reconstruction_weight=-1)
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        FT("layer", weight=-1)


def test_the_teachers_layer_has_the_students_name_unless_given() -> None:
    assert FT("a").teacher_layers == ("a",)
    assert FT("a", "b").teacher_layers == ("b",)
