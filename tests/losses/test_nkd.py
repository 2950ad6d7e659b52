import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import NKD, nkd
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER, LABELS = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5), torch.arange(8)


def by_loops(student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float) -> float:
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        total -= softmax(t)[y] * math.log(softmax(s)[y])
        p, q = (softmax(z[:y] + z[y + 1 :], temperature) for z in (s, t))
        total -= gamma * temperature**2 * sum(b * math.log(a) for a, b in zip(p, q, strict=True))
    return total / len(student)


def test_value_of_the_authors() -> None:
    assert nkd(STUDENT, TEACHER, LABELS).item() == pytest.approx(6.081709792956316, rel=1e-12)


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (0.0, 2.0), (3.0, 4.0)])
def test_value_and_gradient_equal_the_formula(gamma: float, temperature: float) -> None:
    inputs = TEACHER[:3, :7], LABELS[2:5]
    student = STUDENT[:3, :7].clone().requires_grad_()
    loss = nkd(student, *inputs, gamma=gamma, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT[:3, :7], *inputs, gamma, temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, *inputs, gamma, temperature), STUDENT[:3, :7])
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


def test_where_the_student_equals_the_teacher_the_entropies_are_left() -> None:
    p = torch.softmax(STUDENT, -1)[range(8), LABELS]
    others = torch.stack([torch.cat([STUDENT[i, :i], STUDENT[i, i + 1 :]]) for i in range(8)])
    entropy = torch.distributions.Categorical(logits=others / 2).entropy()
    student = STUDENT.clone().requires_grad_()
    loss = nkd(student, STUDENT, LABELS, gamma=1.5, temperature=2.0)
    torch.testing.assert_close(loss, (-p * p.log() + 1.5 * 4 * entropy).mean())
    # The distribution of the others is at its minimum; the label's own term still asks for more confidence.
    loss.backward()
    expected = (p[:, None] * (torch.softmax(STUDENT, -1) - torch.eye(10, dtype=torch.float64)[:8])) / 8
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_the_limit_and_not_nan(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, -1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 1e4]], dtype=dtype)
    loss = nkd(student, teacher, torch.tensor([0, 2]), gamma=1.0)
    loss.backward()
    # The teacher does not believe the first label and is sure of the second class; both are sure of the second label,
    # whose others are halves for the teacher and (1, 0) for the student.
    assert loss.item() == pytest.approx((1e4 + 0.5 * 1e4) / 2)
    assert student.grad.tolist() == [[0.0, -0.5, 0.5], [0.25, -0.25, 0.0]]


@settings(max_examples=25)
@given(st.floats(-5, 5))
def test_the_label_does_not_enter_the_distribution_of_the_others(confidence: float) -> None:
    moved = STUDENT + confidence * torch.eye(10, dtype=torch.float64)[:8]
    own = [nkd(s, TEACHER, LABELS, gamma=0.0) for s in (STUDENT, moved)]
    whole = [nkd(s, TEACHER, LABELS, gamma=2.0) for s in (STUDENT, moved)]
    torch.testing.assert_close(whole[0] - own[0], whole[1] - own[1])


def test_the_module_is_the_function_at_its_present_settings() -> None:
    loss = NKD(gamma=0.5, temperature=3.0)
    assert loss.needs_labels
    value = loss(Outputs(STUDENT), Outputs(TEACHER), LABELS)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, LABELS, 0.5, 3.0), rel=1e-12)
    loss.gamma, loss.temperature = 2.0, 1.5
    value = loss(Outputs(STUDENT), Outputs(TEACHER), LABELS)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, LABELS, 2.0, 1.5), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "expected gamma >= 0, got -1.0"),
        ({"temperature": math.nan}, "expected temperature > 0, got nan"),
        ({"weight": -1.0}, "expected weight >= 0, got -1.0"),
    ],
)
def test_coefficients_that_turn_a_term_round_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NKD(**options)
