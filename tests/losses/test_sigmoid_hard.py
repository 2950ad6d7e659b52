import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import SigmoidHard, bce, sigmoid_hard
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    values = [
        math.log(1 + math.exp(-s if t > 0 else s))
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    ]
    return sum(values) / len(values)


def test_value_and_gradient_equal_the_formula() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = SigmoidHard()(Outputs(student), Outputs(TEACHER), None)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    # Central differences are right to some 1e-9.
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(loss, bce(STUDENT, (TEACHER > 0).long()))


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: sigmoid_hard(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    sigmoid_hard(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_where_the_student_equals_the_teacher_its_own_confidence_is_left() -> None:
    confidence = torch.maximum(STUDENT.sigmoid(), 1 - STUDENT.sigmoid())
    torch.testing.assert_close(sigmoid_hard(STUDENT, STUDENT), -confidence.log().mean())


def test_labels_that_contradict_the_teacher_change_nothing() -> None:
    contradiction = (TEACHER <= 0).long()
    with_labels = SigmoidHard()(Outputs(STUDENT), Outputs(TEACHER), contradiction)
    assert with_labels == SigmoidHard()(Outputs(STUDENT), Outputs(TEACHER), None)


def test_extreme_logits_and_a_batch_of_one_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = sigmoid_hard(student, torch.tensor([[-1e4, -1e4]]))
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert student.grad.tolist() == [[0.5, 0.0]]


@given(scale=st.floats(0.1, 10), samples=st.permutations(range(8)), labels=st.permutations(range(10)))
def test_only_the_teachers_choice_counts(scale: float, samples: list[int], labels: list[int]) -> None:
    other = sigmoid_hard(STUDENT[samples][:, labels], (TEACHER * scale)[samples][:, labels])
    assert other.item() == pytest.approx(sigmoid_hard(STUDENT, TEACHER).item(), rel=1e-9)


def test_other_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        sigmoid_hard(STUDENT, TEACHER[:, :9])
