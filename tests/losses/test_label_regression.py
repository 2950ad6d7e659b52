import math

import pytest
import torch
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import LabelRegression, label_regression
from tests.losses.reference import numerical_gradient, wave

STUDENT, TARGET = wave((6, 2), 0.7, 0.1), wave((6, 2), 1.3, 0.5)
SOME_UNKNOWN = TARGET.clone()
SOME_UNKNOWN[0, 1] = SOME_UNKNOWN[2] = math.nan
OUTPUTS = Outputs(torch.zeros(0))


def error(d: float, form: str, delta: float) -> float:
    if form == "mse":
        return d**2
    if form == "l1":
        return abs(d)
    return d**2 / 2 if abs(d) <= delta else delta * (abs(d) - delta / 2)


def by_loops(student: Tensor, target: Tensor, form: str, delta: float) -> float:
    pairs = zip(student.flatten().tolist(), target.flatten().tolist(), strict=True)
    values = [error(s - y, form, delta) for s, y in pairs if not math.isnan(y)]
    return sum(values) / len(values)


@pytest.mark.parametrize("target", [TARGET, SOME_UNKNOWN])
@pytest.mark.parametrize(("form", "delta"), [("mse", 1.0), ("l1", 1.0), ("huber", 1.0), ("huber", 2.5)])
def test_value_and_gradient_equal_the_formula(form: str, delta: float, target: Tensor) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = LabelRegression(form, delta)(Outputs(student), OUTPUTS, target)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, target, form, delta), rel=1e-12)
    # Central differences are right to some 1e-9.
    expected = numerical_gradient(lambda s: by_loops(s, target, form, delta), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(student.grad == 0, target.isnan())


@pytest.mark.parametrize("form", ["mse", "l1", "huber"])
def test_gradient_is_right(form: str) -> None:
    inputs = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: label_regression(s, SOME_UNKNOWN, form=form), inputs)


@pytest.mark.parametrize("form", ["mse", "l1", "huber"])
def test_zero_with_a_gradient_of_zero_where_the_student_is_right(form: str) -> None:
    student = TARGET.clone().requires_grad_()
    loss = label_regression(student, TARGET, form=form)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize("target", [None, torch.full((6, 2), math.nan)])
def test_zero_with_a_gradient_of_zero_where_no_value_is_known(target: Tensor | None) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = LabelRegression()(Outputs(student), OUTPUTS, target)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_whole_numbers_are_values_and_minus_hundred_is_one_of_them() -> None:
    assert label_regression(torch.tensor([[0.0], [3.0]]), torch.tensor([[-100], [3]])).item() == 5000


def test_extreme_values_and_a_batch_of_one_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = label_regression(student, torch.tensor([[-1e4, 1e4]]))
    loss.backward()
    assert loss.item() == pytest.approx(4e8)
    assert student.grad.tolist() == [[2e4, -2e4]]


@pytest.mark.parametrize(("student", "target"), [((6,), (6, 1)), ((6, 1), (6,)), ((6, 2), (6, 1)), ((6, 2), (2,))])
def test_a_target_of_another_shape_is_refused_and_not_broadcast(student: tuple, target: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected values of one shape, got .* for a single output, target"):
        label_regression(torch.zeros(student), torch.ones(target))


def test_another_form_and_a_delta_that_is_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match="expected form to be one of mse, l1, huber, got 'rmse'"):
        LabelRegression("rmse")
    for delta in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="expected delta > 0, got"):
            LabelRegression("huber", delta)
