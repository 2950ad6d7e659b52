import math

import pytest
import torch
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import RLD, rld
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER, LABELS = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5), torch.arange(8)


def kl(p: list[float], q: list[float]) -> float:
    return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


def by_loops(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float, scd: float
) -> float:
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p, q = softmax(s, scd)[y], max(softmax(t, scd))
        total += alpha * scd**2 * kl([p, 1 - p], [q, 1 - q])
        below = [i for i in range(len(t)) if t[i] < t[y]]
        p, q = (softmax([z[i] for i in below], temperature) for z in (s, t))
        total += beta * temperature**2 * kl(p, q)
    return total / len(student)


def test_value_of_the_authors() -> None:
    assert rld(STUDENT, TEACHER, LABELS).item() == pytest.approx(18.712118711410316, rel=1e-12)


@pytest.mark.parametrize(
    "factors", [(1.0, 8.0, 4.0, 1.0), (0.5, 2.0, 1.0, 3.0), (1.0, 0.0, 1.0, 2.0), (0.0, 1.0, 2.0, 1.0)]
)
def test_value_and_gradient_equal_the_formula(factors: tuple[float, float, float, float]) -> None:
    alpha, beta, temperature, scd = factors
    inputs = TEACHER[:3, :7], LABELS[2:5]
    student = STUDENT[:3, :7].clone().requires_grad_()
    loss = rld(student, *inputs, alpha=alpha, beta=beta, temperature=temperature, scd_temperature=scd)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT[:3, :7], *inputs, *factors), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, *inputs, *factors), STUDENT[:3, :7])
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


def test_zero_with_a_gradient_of_zero_where_the_student_equals_a_teacher_that_is_right() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = rld(student, STUDENT.clone(), STUDENT.argmax(-1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-13)
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT))


def test_where_the_teacher_is_wrong_the_student_takes_its_confidence_to_the_label() -> None:
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    student, label = teacher.clone().requires_grad_(), torch.tensor([1])
    rld(student, teacher, label, beta=0.0).backward()
    assert student.grad[0].argmin() == 1
    assert (student.grad[0, [0, 2, 3]] > 0).all()
    swapped = torch.tensor([[2.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
    assert rld(swapped, teacher, label).item() == pytest.approx(0, abs=1e-14)


def test_classes_at_and_above_the_label_are_not_related() -> None:
    teacher = torch.tensor([[3.0, 2.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[-1.0, 0.5, 2.0, 0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    rld(student, teacher, torch.tensor([1]), alpha=0.0).backward()
    assert (student.grad[0] != 0).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("label", [2, 1])
def test_fewer_than_two_classes_below_the_label_leave_the_confidence(label: int) -> None:
    student = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
    loss = rld(student, torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([label]), alpha=0.0)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_the_limit_and_not_nan(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 1e4]], dtype=dtype)
    loss = rld(student, teacher, torch.tensor([1, 2]), beta=1.0, temperature=1.0)
    loss.backward()
    # First: the teacher is sure, the student's log p of the label is -2e4; below it the teacher prefers the third
    # class, the student the first, by 1e4. Second: both are sure, and halves against (1, 0) are left below.
    assert loss.item() == pytest.approx((2e4 + 1e4 + 0.5 * (2 * math.log(0.5) + 1e4)) / 2)
    assert student.grad.tolist() == [[1.0, -0.5, -0.5], [0.25, -0.25, 0.0]]


def test_a_class_of_probability_one_stays_finite_in_float32() -> None:
    student = torch.tensor([[500.0, 0.0, -3.0]], requires_grad=True)
    loss = rld(student, torch.tensor([[900.0, 1.0, 2.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_the_module_is_the_function_at_its_present_settings() -> None:
    loss = RLD(alpha=0.5, beta=2.0, temperature=3.0, scd_temperature=2.0)
    assert loss.needs_labels
    value = loss(Outputs(STUDENT), Outputs(TEACHER), LABELS)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, LABELS, 0.5, 2.0, 3.0, 2.0), rel=1e-12)
    loss.alpha, loss.beta, loss.temperature, loss.scd_temperature = 2.0, 1.0, 1.5, 0.5
    value = loss(Outputs(STUDENT), Outputs(TEACHER), LABELS)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, LABELS, 2.0, 1.0, 1.5, 0.5), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "expected alpha >= 0, got -1.0"),
        ({"beta": -2.0}, "expected beta >= 0, got -2.0"),
        ({"scd_temperature": 0.0}, "expected temperature > 0, got 0.0"),
        ({"temperature": math.nan}, "expected temperature > 0, got nan"),
        ({"weight": -1.0}, "expected weight >= 0, got -1.0"),
    ],
)
def test_coefficients_that_turn_a_term_round_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLD(**options)


def test_the_temperature_of_the_confidence_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="expected temperature > 0, got -1"):
        rld(STUDENT, TEACHER, LABELS, scd_temperature=-1)
