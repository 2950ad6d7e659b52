import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_lightning import Outputs
from kd_lightning.losses import TeacherRegression, logits_mse, teacher_regression
from tests.losses.reference import numerical_gradient, wave
from tests.losses.test_label_regression import by_loops

STUDENT, TEACHER = wave((6, 2), 0.7, 0.1), wave((6, 2), 1.3, 0.5)


@pytest.mark.parametrize(("form", "delta"), [("mse", 1.0), ("l1", 1.0), ("huber", 1.0), ("huber", 2.5)])
def test_value_and_gradient_equal_the_formula(form: str, delta: float) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = TeacherRegression(form, delta)(Outputs(student), Outputs(TEACHER), torch.full((6, 2), math.nan))
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER, form, delta), rel=1e-12)
    # Central differences are right to some 1e-9.
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER, form, delta), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_the_squared_form_is_the_regression_of_logits() -> None:
    torch.testing.assert_close(teacher_regression(STUDENT, TEACHER), logits_mse(STUDENT, TEACHER))


@pytest.mark.parametrize("form", ["mse", "l1", "huber"])
def test_gradient_is_right_and_none_is_the_teachers(form: str) -> None:
    assert torch.autograd.gradcheck(
        lambda s: teacher_regression(s, TEACHER, form=form), STUDENT.clone().requires_grad_()
    )
    teacher = TEACHER.clone().requires_grad_()
    teacher_regression(STUDENT.clone().requires_grad_(), teacher, form=form).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("form", ["mse", "l1", "huber"])
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(form: str) -> None:
    student = TEACHER.clone().requires_grad_()
    loss = teacher_regression(student, TEACHER, form=form)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@given(shift=st.floats(-20, 20), scale=st.floats(0.1, 10), samples=st.permutations(range(6)))
def test_a_common_shift_and_order_change_nothing_and_the_size_counts_by_its_power(
    shift: float, scale: float, samples: list[int]
) -> None:
    pair = [(scale * x + shift)[samples] for x in (STUDENT, TEACHER)]
    for form, power in (("mse", 2), ("l1", 1)):
        expected = scale**power * teacher_regression(STUDENT, TEACHER, form=form).item()
        assert teacher_regression(*pair, form=form).item() == pytest.approx(expected, rel=1e-9)
    huber = teacher_regression(*pair, form="huber", delta=scale).item()
    assert huber == pytest.approx(scale**2 * teacher_regression(STUDENT, TEACHER, form="huber").item(), rel=1e-9)


def test_extreme_values_and_a_batch_of_one_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = teacher_regression(student, torch.tensor([[-1e4, 1e4]]))
    loss.backward()
    assert loss.item() == pytest.approx(4e8)
    assert student.grad.tolist() == [[2e4, -2e4]]


def test_other_shapes_are_refused_and_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"expected values of one shape, got \(6, 1\) and \(6,\)"):
        teacher_regression(torch.zeros(6, 1), torch.ones(6))
