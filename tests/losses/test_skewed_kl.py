import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import (
    SkewedForwardKL,
    SkewedReverseKL,
    forward_kl,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)
# The reference values were computed with labels on the first six rows, in float32: right to some 1e-7.
SIX = torch.tensor([0, 1, 2, 3, 4, 5, -100, -100])
# The authors' forward divergence leaves out Σ p_t log p_t, which is no matter of the student's.
ENTROPY = -sum(p * math.log(p) for t in TEACHER[:6].tolist() for p in softmax(t)) / 6
MODULES = {skewed_forward_kl: SkewedForwardKL, skewed_reverse_kl: SkewedReverseKL}


def forward_by_loops(student: Tensor, teacher: Tensor, lam: float, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        for p_s, p_t in zip(softmax(s, temperature), softmax(t, temperature), strict=True):
            total += p_t * math.log(p_t / (lam * p_t + (1 - lam) * p_s))
    return temperature**2 * total / len(student)


def reverse_by_loops(student: Tensor, teacher: Tensor, lam: float, temperature: float) -> float:
    return forward_by_loops(teacher, student, lam, temperature)


def test_values_of_the_authors() -> None:
    forward = skewed_forward_kl(STUDENT, TEACHER, SIX, lam=0.1).item()
    assert forward + ENTROPY == pytest.approx(2.713505983352661, rel=2e-7)
    reverse = skewed_reverse_kl(STUDENT, TEACHER, SIX, lam=0.1).item()
    assert reverse == pytest.approx(1.244254469871521, rel=2e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("lam", [0.1, 0.7])
@pytest.mark.parametrize(
    ("loss", "by_loops"), [(skewed_forward_kl, forward_by_loops), (skewed_reverse_kl, reverse_by_loops)]
)
def test_value_and_gradient_equal_the_formula(loss, by_loops, lam: float, temperature: float) -> None:
    student = STUDENT[:3].clone().requires_grad_()
    value = loss(student, TEACHER[:3], lam=lam, temperature=temperature)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT[:3], TEACHER[:3], lam, temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER[:3], lam, temperature), STUDENT[:3])
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("skewed", "plain"), [(skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)])
def test_without_skew_it_is_the_plain_divergence_and_so_is_its_gradient(skewed, plain) -> None:
    mine, other = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    value, expected = skewed(mine, TEACHER, lam=0.0), plain(other, TEACHER)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, other.grad)
    assert skewed(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), lam=0.0) == 2e4


@settings(max_examples=25)
@given(st.floats(0.001, 0.999))
def test_at_most_minus_log_lam_and_there_where_both_are_sure(lam: float) -> None:
    sure = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    for loss in MODULES:
        assert loss(STUDENT, TEACHER, lam=lam) < -math.log(lam)
        assert loss(*sure, lam=lam).item() == pytest.approx(-math.log(lam), rel=1e-4)


@pytest.mark.parametrize("loss", MODULES)
def test_the_module_takes_its_present_skew(loss) -> None:
    module = MODULES[loss](lam=0.3)
    assert module(Outputs(STUDENT), Outputs(TEACHER), None) == loss(STUDENT, TEACHER, lam=0.3)
    module.lam = 0.6
    assert module(Outputs(STUDENT), Outputs(TEACHER), None) == loss(STUDENT, TEACHER, lam=0.6)


@pytest.mark.parametrize("loss", MODULES)
@pytest.mark.parametrize("lam", [-0.1, 1.0, math.nan])
def test_a_skew_outside_of_0_and_1_is_refused(loss, lam: float) -> None:
    with pytest.raises(ValueError, match=rf"expected lam in \[0, 1\), got {lam}: 0 is the plain divergence"):
        loss(STUDENT, TEACHER, lam=lam)
    with pytest.raises(ValueError, match=r"expected lam in \[0, 1\)"):
        MODULES[loss](lam=lam)
