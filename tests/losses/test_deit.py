import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import DeiTHard, deit_hard
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    values = [
        -math.log(softmax(s)[max(range(len(t)), key=t.__getitem__)])
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return sum(values) / len(values)


def test_value_of_the_authors() -> None:
    assert deit_hard(STUDENT, TEACHER).item() == pytest.approx(3.9585839346636944, rel=1e-13)


def test_value_and_gradient_equal_the_formula() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = DeiTHard()(Outputs(student), Outputs(TEACHER), None)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    # Central differences are right to some 1e-9.
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: deit_hard(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    deit_hard(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_where_the_student_equals_the_teacher_its_own_confidence_is_left() -> None:
    confidence = torch.softmax(STUDENT, -1).max(-1).values
    torch.testing.assert_close(deit_hard(STUDENT, STUDENT), -confidence.log().mean())


def test_labels_that_contradict_the_teacher_change_nothing() -> None:
    contradiction = (TEACHER.argmax(-1) + 1) % 10
    with_labels = DeiTHard()(Outputs(STUDENT), Outputs(TEACHER), contradiction)
    assert with_labels == DeiTHard()(Outputs(STUDENT), Outputs(TEACHER), None)


def test_tokens_count_as_samples() -> None:
    assert deit_hard(STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10)) == deit_hard(STUDENT, TEACHER)


def test_extreme_logits_and_a_batch_of_one_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = deit_hard(student, torch.tensor([[-1e4, 1e4, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad.tolist() == [[1.0, -1.0, 0.0]]


@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    scale=st.floats(0.1, 10),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_only_the_teachers_choice_counts(
    shift: list[float], scale: float, samples: list[int], classes: list[int]
) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    other = deit_hard((STUDENT + moved)[samples][:, classes], (TEACHER * scale + moved)[samples][:, classes])
    assert other.item() == pytest.approx(deit_hard(STUDENT, TEACHER).item(), rel=1e-9)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        deit_hard(STUDENT, TEACHER[:, :9])
