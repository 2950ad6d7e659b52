import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import SigmoidKD, kd, sigmoid_kd
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def by_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = sigmoid(s / temperature), sigmoid(t / temperature)
        total += q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    return temperature**2 * total / student.numel()


def test_ten_labels_at_temperature_one_are_the_authors_sum() -> None:
    """Their KLDivLoss of both outcomes, summed over labels and divided by the samples, in their reduction batchmean."""
    p, q = STUDENT.sigmoid(), TEACHER.sigmoid()
    divergence = torch.nn.KLDivLoss(reduction="none")
    theirs = (divergence(p.log(), q) + divergence((1 - p).log(), 1 - q)).sum() / len(STUDENT)
    assert 10 * sigmoid_kd(STUDENT, TEACHER).item() == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 16.0])
def test_value_and_gradient_equal_the_formula(temperature: float) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = sigmoid_kd(student, TEACHER, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER, temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER, temperature), STUDENT)
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)
    difference = torch.sigmoid(STUDENT / temperature) - torch.sigmoid(TEACHER / temperature)
    torch.testing.assert_close(student.grad, temperature * difference / STUDENT.numel())


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: sigmoid_kd(s, TEACHER, temperature=2.0), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    sigmoid_kd(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_one_label_is_kd_on_two_classes_of_which_one_has_the_logit_zero() -> None:
    pairs = [torch.stack([torch.zeros(8), z[:, 0]], -1) for z in (STUDENT, TEACHER)]
    expected = kd(*pairs, temperature=3.0)
    torch.testing.assert_close(sigmoid_kd(STUDENT[:, :1], TEACHER[:, :1], temperature=3.0), expected)


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = sigmoid_kd(student, STUDENT.clone(), temperature=4.0)
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT))


def test_gradient_stays_of_one_size_when_the_temperature_changes() -> None:
    sizes = []
    for temperature in (16.0, 64.0):
        student = STUDENT.clone().requires_grad_()
        sigmoid_kd(student, TEACHER, temperature=temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_the_limit_and_not_nan(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = sigmoid_kd(student, torch.tensor([[-1e4, 1e4, 1e4, -1e4]], dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(2e4 / 4)
    assert student.grad.tolist() == [[0.25, -0.25, 0.0, 0.0]]


@given(samples=st.permutations(range(8)), labels=st.permutations(range(10)))
def test_the_order_of_samples_and_labels_changes_nothing(samples: list[int], labels: list[int]) -> None:
    shuffled = sigmoid_kd(STUDENT[samples][:, labels], TEACHER[samples][:, labels], temperature=4.0)
    assert shuffled.item() == pytest.approx(sigmoid_kd(STUDENT, TEACHER, temperature=4.0).item(), rel=1e-12)


@given(st.floats(-5, 5))
def test_a_shift_of_a_samples_logits_changes_the_loss_as_no_label_excludes_another(shift: float) -> None:
    moved = sigmoid_kd(STUDENT + shift, TEACHER).item()
    assert moved == pytest.approx(by_loops(STUDENT + shift, TEACHER, 1.0), rel=1e-9)


def test_labels_that_are_not_known_count_and_the_module_has_its_present_temperature() -> None:
    loss = SigmoidKD()
    for temperature in (1.0, 2.0):
        loss.temperature = temperature
        for target in (None, torch.full((8, 10), -100)):
            value = loss(Outputs(STUDENT), Outputs(TEACHER), target)
            assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, temperature), rel=1e-12)


def test_other_labels_and_a_temperature_that_is_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        sigmoid_kd(STUDENT, TEACHER[:, :9])
    for make in (SigmoidKD, lambda temperature: sigmoid_kd(STUDENT, TEACHER, temperature=temperature)):
        with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
            make(temperature=0)
