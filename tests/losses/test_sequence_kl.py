import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import SymmetricKL, forward_kl, kd, reverse_kl, symmetric_kl
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)
# The reference values were computed with labels on the first six rows, in float32: right to some 1e-7.
SIX = torch.tensor([0, 1, 2, 3, 4, 5, -100, -100])
# The authors' forward divergences leave out Σ p_t log p_t, which is no matter of the student's.
ENTROPY = -sum(p * math.log(p) for t in TEACHER[:6].tolist() for p in softmax(t)) / 6


def forward_by_loops(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        soft_s, soft_t = softmax(s, temperature), softmax(t, temperature)
        total += sum(q * math.log(q / p) for p, q in zip(soft_s, soft_t, strict=True))
    return temperature**2 * total / len(student)


def reverse_by_loops(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    return forward_by_loops(teacher, student, temperature)


def symmetric_by_loops(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    forward = forward_by_loops(student, teacher, temperature)
    return 0.1 * forward + 0.9 * reverse_by_loops(student, teacher, temperature)


def test_values_of_the_authors() -> None:
    forward, reverse = forward_kl(STUDENT, TEACHER, SIX).item(), reverse_kl(STUDENT, TEACHER, SIX).item()
    assert forward + ENTROPY == pytest.approx(3.917961835861206, rel=2e-7)
    assert reverse == pytest.approx(2.540135622024536, rel=2e-7)
    symmetric = symmetric_kl(STUDENT, TEACHER, SIX, lam=0.9).item()
    assert symmetric + 0.1 * ENTROPY == pytest.approx(2.6779181957244873, rel=2e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("loss", "by_loops"),
    [(forward_kl, forward_by_loops), (reverse_kl, reverse_by_loops), (symmetric_kl, symmetric_by_loops)],
)
def test_value_and_gradient_equal_the_formula(loss, by_loops, temperature: float) -> None:
    student = STUDENT[:3].clone().requires_grad_()
    value = loss(student, TEACHER[:3], temperature=temperature)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT[:3], TEACHER[:3], temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER[:3], temperature), STUDENT[:3])
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_the_forward_divergence_is_kd() -> None:
    value = forward_kl(STUDENT, TEACHER, SIX, temperature=3.0)
    assert value.item() == pytest.approx(kd(STUDENT, TEACHER, SIX, temperature=3.0).item(), rel=1e-13)


def test_extreme_logits_give_the_limit() -> None:
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True), torch.tensor([[-1e4, 1e4, 0.0]])
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    assert (forward.item(), reverse.item()) == (2e4, 2e4)
    assert torch.autograd.grad(forward, student)[0].tolist() == [[1.0, -1.0, 0.0]]
    assert torch.autograd.grad(reverse, student)[0].tolist() == [[0.0, 0.0, 0.0]]  # it says one token only


@settings(max_examples=25)
@given(st.floats(0, 1))
def test_swapping_the_sides_swaps_the_shares(lam: float) -> None:
    swapped = symmetric_kl(TEACHER, STUDENT, lam=1 - lam).item()
    assert symmetric_kl(STUDENT, TEACHER, lam=lam).item() == pytest.approx(swapped, rel=1e-12)


def test_the_ends_of_the_share_are_the_two_divergences() -> None:
    assert symmetric_kl(STUDENT, TEACHER, lam=0.0) == forward_kl(STUDENT, TEACHER)
    assert symmetric_kl(STUDENT, TEACHER, lam=1.0) == reverse_kl(STUDENT, TEACHER)


def test_the_module_takes_its_present_share() -> None:
    module = SymmetricKL(lam=0.3)
    assert module(Outputs(STUDENT), Outputs(TEACHER), None) == symmetric_kl(STUDENT, TEACHER, lam=0.3)
    module.lam = 0.6
    assert module(Outputs(STUDENT), Outputs(TEACHER), None) == symmetric_kl(STUDENT, TEACHER, lam=0.6)


@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
def test_a_share_outside_of_0_and_1_is_refused(lam: float) -> None:
    with pytest.raises(ValueError, match=rf"expected lam in \[0, 1\], got {lam}: 0 is forward_kl, 1 is reverse_kl"):
        symmetric_kl(STUDENT, TEACHER, lam=lam)
    with pytest.raises(ValueError, match=r"expected lam in \[0, 1\]"):
        SymmetricKL(lam=lam)
