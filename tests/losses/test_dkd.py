import math

import pytest
import torch
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import DKD, dkd, kd
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER, LABELS = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5), torch.arange(8)


def by_loops(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float) -> float:
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p, q = softmax(s, temperature), softmax(t, temperature)
        tckd = q[y] * math.log(q[y] / p[y]) + (1 - q[y]) * math.log((1 - q[y]) / (1 - p[y]))
        others = [i for i in range(len(s)) if i != y]
        nckd = sum(q[i] / (1 - q[y]) * math.log(q[i] / (1 - q[y]) / (p[i] / (1 - p[y]))) for i in others)
        total += alpha * tckd + beta * nckd
    return temperature**2 * total / len(student)


@pytest.mark.parametrize(
    ("alpha", "beta", "value"), [(1, 8, 34.97323975959349), (1, 0, 0.376175915361638), (0, 1, 4.324632980528982)]
)
def test_value_of_the_authors(alpha: float, beta: float, value: float) -> None:
    loss = dkd(STUDENT, TEACHER, LABELS, alpha=alpha, beta=beta, temperature=4.0)
    assert loss.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("options", [(1.0, 8.0, 4.0), (0.5, 2.0, 1.0), (3.0, 0.0, 16.0)])
def test_value_and_gradient_equal_the_formula(options: tuple[float, float, float]) -> None:
    alpha, beta, temperature = options
    student = STUDENT[:3].clone().requires_grad_()
    loss = dkd(student, TEACHER[:3], LABELS[:3], alpha=alpha, beta=beta, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT[:3], TEACHER[:3], LABELS[:3], *options), rel=1e-11)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER[:3], LABELS[:3], *options), STUDENT[:3])
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_first_part_and_the_second_by_the_mass_of_the_other_classes(temperature: float) -> None:
    for i in range(8):
        one = (STUDENT[i : i + 1], TEACHER[i : i + 1], LABELS[i : i + 1])
        first, second = (dkd(*one, alpha=a, beta=1 - a, temperature=temperature) for a in (1, 0))
        mass = 1 - torch.softmax(TEACHER[i] / temperature, -1)[i]
        torch.testing.assert_close(first + mass * second, kd(*one[:2], temperature=temperature))


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = dkd(student, STUDENT.clone(), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-13)
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_the_limit_and_not_nan(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 1e4]], dtype=dtype)
    loss = dkd(student, teacher, torch.tensor([0, 2]), alpha=1.0, beta=1.0, temperature=1.0)
    loss.backward()
    # First sample: the teacher is sure of the others (student: log(1 - p) = 0 - 1e4), among which it is sure of the
    # second (student: -1e4 - 0). Second sample: both are sure of the label, and halves against (1, 0) are left.
    assert loss.item() == pytest.approx((1e4 + 1e4 + 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 1e4)) / 2)
    # In the first sample TCKD moves mass from the label to the third class, and NCKD from there to the second.
    assert student.grad.tolist() == [[0.5, -0.5, 0.0], [0.25, -0.25, 0.0]]


def test_a_class_of_probability_one_stays_finite_in_float32() -> None:
    student = torch.tensor([[500.0, 0.0, -3.0]], requires_grad=True)
    loss = dkd(student, torch.tensor([[900.0, 1.0, 2.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_the_module_is_the_function_at_its_present_settings() -> None:
    loss = DKD(alpha=0.5, beta=2.0, temperature=3.0)
    assert loss.needs_labels
    assert loss(Outputs(STUDENT), Outputs(TEACHER), LABELS).item() == pytest.approx(
        by_loops(STUDENT, TEACHER, LABELS, 0.5, 2.0, 3.0), rel=1e-12
    )
    loss.alpha, loss.beta, loss.temperature = 2.0, 1.0, 1.5
    assert loss(Outputs(STUDENT), Outputs(TEACHER), LABELS).item() == pytest.approx(
        by_loops(STUDENT, TEACHER, LABELS, 2.0, 1.0, 1.5), rel=1e-12
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "expected alpha >= 0, got -1.0"),
        ({"beta": math.nan}, "expected beta >= 0, got nan"),
        ({"temperature": 0.0}, "expected temperature > 0, got 0.0"),
        ({"weight": -1.0}, "expected weight >= 0, got -1.0"),
    ],
)
def test_coefficients_that_turn_a_term_round_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DKD(**options)
