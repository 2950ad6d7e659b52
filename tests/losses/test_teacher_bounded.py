import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import TeacherBounded, teacher_bounded
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER, TARGET = wave((8, 3), 0.7, 0.1), wave((8, 3), 1.3, 0.5), wave((8, 3), 0.9, 0.3)
SOME_UNKNOWN = TARGET.clone()
SOME_UNKNOWN[0, 1] = SOME_UNKNOWN[2] = math.nan


def by_loops(student: Tensor, teacher: Tensor, target: Tensor, margin: float) -> float:
    values = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        known = [i for i in range(len(y)) if not math.isnan(y[i])]
        if not known:
            continue
        of_student, of_teacher = (sum((r[i] - y[i]) ** 2 for i in known) for r in (s, t))
        values.append(of_student if of_student + margin > of_teacher else 0.0)
    return sum(values) / len(values)


@pytest.mark.parametrize("target", [TARGET, SOME_UNKNOWN])
@pytest.mark.parametrize("margin", [0.0, 0.5, 100.0])
def test_value_and_gradient_equal_the_formula(margin: float, target: Tensor) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = TeacherBounded(margin)(Outputs(student), Outputs(TEACHER), target)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER, target, margin), rel=1e-12)
    # Central differences are right to some 1e-9, where no sample is as good as the teacher to 1e-5.
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER, target, margin), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


def test_a_sample_at_which_the_student_is_better_by_the_margin_has_no_gradient_and_the_others_have() -> None:
    y, teacher = torch.zeros(4, 1), torch.full((4, 1), 2.0)
    for margin, penalised in ((0.0, [False, False, True, True]), (2.0, [False, True, True, True])):
        student = torch.tensor([[1.0], [-1.9], [2.1], [5.0]], requires_grad=True)
        teacher_bounded(student, teacher, y, margin=margin).backward()
        assert (student.grad.flatten() != 0).tolist() == penalised


def test_with_a_margin_above_every_error_of_the_teacher_it_is_the_squared_error() -> None:
    value = teacher_bounded(STUDENT, TEACHER, TARGET, margin=1e6)
    torch.testing.assert_close(value, (STUDENT - TARGET).square().sum(1).mean())


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    inputs = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: teacher_bounded(s, TEACHER, SOME_UNKNOWN, margin=0.5), inputs)
    teacher = TEACHER.clone().requires_grad_()
    teacher_bounded(STUDENT.clone().requires_grad_(), teacher, TARGET).backward()
    assert teacher.grad is None


def test_where_the_student_equals_the_teacher_zero_without_a_margin_and_its_error_with_one() -> None:
    student = TEACHER.clone().requires_grad_()
    loss = teacher_bounded(student, TEACHER, TARGET)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    with_margin = teacher_bounded(TEACHER, TEACHER, TARGET, margin=0.1)
    torch.testing.assert_close(with_margin, (TEACHER - TARGET).square().sum(1).mean())


@pytest.mark.parametrize("target", [None, torch.full((8, 3), math.nan)])
def test_zero_with_a_gradient_of_zero_where_no_value_is_known(target: Tensor | None) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = TeacherBounded()(Outputs(student), Outputs(TEACHER), target)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@given(shift=st.floats(-20, 20), samples=st.permutations(range(8)), outputs=st.permutations(range(3)))
def test_order_and_a_common_shift_change_nothing(shift: float, samples: list[int], outputs: list[int]) -> None:
    moved = [(x + shift)[samples][:, outputs] for x in (STUDENT, TEACHER, TARGET)]
    expected = teacher_bounded(STUDENT, TEACHER, TARGET, margin=0.5).item()
    assert teacher_bounded(*moved, margin=0.5).item() == pytest.approx(expected, rel=1e-9)


def test_extreme_values_and_a_batch_of_one_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = teacher_bounded(student, torch.tensor([[0.0, 1e4]]), torch.tensor([[-1e4, 1e4]]))
    loss.backward()
    assert loss.item() == pytest.approx(8e8)
    assert student.grad.tolist() == [[4e4, -4e4]]


def test_other_shapes_and_a_negative_margin_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected values of one shape, got \(8, 3\) and \(8,\)"):
        teacher_bounded(STUDENT, TEACHER, torch.zeros(8))
    with pytest.raises(ValueError, match=r"expected values of one shape, got \(8, 3\) and \(8, 1\)"):
        teacher_bounded(STUDENT, torch.zeros(8, 1), TARGET)
    with pytest.raises(ValueError, match="expected margin >= 0, got -1"):
        TeacherBounded(margin=-1.0)
