import math
import re

import pytest
import torch
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import BCE, bce
from tests.losses.reference import numerical_gradient, wave

STUDENT = wave((6, 5), 0.7, 0.1)
LABELS = torch.tensor([[(3 * i + 2 * j) % 7 < 3 for j in range(5)] for i in range(6)]).long()
SOME_UNKNOWN = LABELS.clone()
SOME_UNKNOWN[0, 1] = SOME_UNKNOWN[2] = -100
OUTPUTS = Outputs(torch.zeros(0))


def by_loops(student: Tensor, target: Tensor) -> float:
    values = []
    for z, y in zip(student.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        if y != -100:
            values.append(-y * math.log(p) - (1 - y) * math.log(1 - p))
    return sum(values) / len(values)


@pytest.mark.parametrize("target", [LABELS, LABELS.double(), LABELS.float(), LABELS * 0.8 + 0.1, SOME_UNKNOWN])
def test_value_and_gradient_equal_the_formula(target: Tensor) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = BCE()(Outputs(student), OUTPUTS, target)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, target), rel=1e-7)
    # Central differences are right to some 1e-9; labels of 0.8 in float32 to 1e-7.
    expected = numerical_gradient(lambda s: by_loops(s, target), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-8)


def test_without_unknown_labels_it_is_pytorchs() -> None:
    expected = torch.nn.BCEWithLogitsLoss()(STUDENT, LABELS.double())
    assert bce(STUDENT, LABELS).item() == pytest.approx(expected.item(), rel=1e-13)


def test_gradient_is_right_and_zero_where_the_label_is_not_known() -> None:
    assert torch.autograd.gradcheck(lambda s: bce(s, SOME_UNKNOWN), STUDENT.clone().requires_grad_())
    student = STUDENT.clone().requires_grad_()
    bce(student, SOME_UNKNOWN).backward()
    assert torch.equal(student.grad == 0, SOME_UNKNOWN == -100)


def test_where_the_student_says_the_target_its_entropy_is_left_and_no_gradient() -> None:
    student, p = STUDENT.clone().requires_grad_(), STUDENT.sigmoid()
    loss = bce(student, p)
    loss.backward()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    torch.testing.assert_close(loss, entropy)
    torch.testing.assert_close(student.grad, torch.zeros_like(p))


@pytest.mark.parametrize("target", [None, torch.full((6, 5), -100)])
def test_zero_with_a_gradient_of_zero_where_no_label_is_known(target: Tensor | None) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = BCE()(Outputs(student), OUTPUTS, target)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_extreme_logits_give_the_limit_and_not_nan() -> None:
    student = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    loss = bce(student, torch.tensor([[1, 0, 0, 1]]))
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert student.grad.tolist() == [[0.0, 0.0, 0.25, -0.25]]


@pytest.mark.parametrize("shape", [(6,), (6, 1), (5, 6), (30,)])
def test_a_target_of_another_shape_is_refused_and_not_broadcast(shape: tuple[int, ...]) -> None:
    message = f"expected a target of the logits' shape (6, 5), one 0 or 1 for each label, got {shape}: "
    with pytest.raises(ValueError, match=re.escape(message)):
        bce(STUDENT, torch.zeros(shape))
