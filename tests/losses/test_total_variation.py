import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning.losses import total_variation
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)
# The reference value was computed with labels on the first six rows, in float32: right to some 1e-7.
SIX = torch.tensor([0, 1, 2, 3, 4, 5, -100, -100])


def by_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total += sum(abs(p - q) for p, q in zip(softmax(s, temperature), softmax(t, temperature), strict=True)) / 2
    return temperature * total / len(student)


def test_value_of_the_authors() -> None:
    assert total_variation(STUDENT, TEACHER, SIX).item() == pytest.approx(0.6835371851921082, rel=2e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_gradient_equal_the_formula(temperature: float) -> None:
    student = STUDENT[:3].clone().requires_grad_()
    value = total_variation(student, TEACHER[:3], temperature=temperature)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT[:3], TEACHER[:3], temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER[:3], temperature), STUDENT[:3])
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_one_where_both_are_sure_of_different_tokens() -> None:
    assert total_variation(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])) == 1


@settings(max_examples=25)
@given(rows=st.permutations(range(8)))
def test_a_metric(rows: list[int]) -> None:
    other = STUDENT[rows]
    distance = total_variation(STUDENT, TEACHER).item()
    assert distance == pytest.approx(total_variation(TEACHER, STUDENT).item(), rel=1e-13)
    through = total_variation(STUDENT, other).item() + total_variation(other, TEACHER).item()
    assert distance <= through + 1e-12
