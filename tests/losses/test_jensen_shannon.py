import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import JensenShannon, forward_kl, jensen_shannon, reverse_kl
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)
# The reference value was computed with labels on the first six rows, in float32: right to some 1e-7.
SIX = torch.tensor([0, 1, 2, 3, 4, 5, -100, -100])


def by_loops(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        for p_s, p_t in zip(softmax(s, temperature), softmax(t, temperature), strict=True):
            m = beta * p_t + (1 - beta) * p_s
            total += beta * p_t * math.log(p_t / m) + (1 - beta) * p_s * math.log(p_s / m)
    return temperature**2 * total / len(student)


def test_value_of_the_authors_whose_lam_is_the_students_share() -> None:
    assert jensen_shannon(STUDENT, TEACHER, SIX, beta=1 - 0.9).item() == pytest.approx(0.15811365842819214, rel=2e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_value_and_gradient_equal_the_formula(beta: float, temperature: float) -> None:
    student = STUDENT[:3].clone().requires_grad_()
    value = jensen_shannon(student, TEACHER[:3], beta=beta, temperature=temperature)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT[:3], TEACHER[:3], beta, temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER[:3], beta, temperature), STUDENT[:3])
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=25)
@given(st.floats(0.001, 0.999))
def test_swapping_the_sides_swaps_the_shares(beta: float) -> None:
    swapped = jensen_shannon(TEACHER, STUDENT, beta=1 - beta).item()
    assert jensen_shannon(STUDENT, TEACHER, beta=beta).item() == pytest.approx(swapped, rel=1e-9)


@settings(max_examples=25)
@given(st.floats(0.001, 0.999))
def test_at_most_the_entropy_of_the_shares(beta: float) -> None:
    most = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert jensen_shannon(STUDENT, TEACHER, beta=beta) < most
    sure = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert jensen_shannon(*sure, beta=beta).item() == pytest.approx(most, rel=1e-5)


def test_close_to_the_ends_it_is_one_of_the_divergences() -> None:
    forward = jensen_shannon(STUDENT, TEACHER, beta=1e-7) / 1e-7
    reverse = jensen_shannon(STUDENT, TEACHER, beta=1 - 1e-7) / 1e-7
    assert forward.item() == pytest.approx(forward_kl(STUDENT, TEACHER).item(), rel=1e-4)
    assert reverse.item() == pytest.approx(reverse_kl(STUDENT, TEACHER).item(), rel=1e-4)


def test_the_module_takes_its_present_share() -> None:
    module = JensenShannon(beta=0.3)
    assert module(Outputs(STUDENT), Outputs(TEACHER), None) == jensen_shannon(STUDENT, TEACHER, beta=0.3)
    module.beta = 0.6
    assert module(Outputs(STUDENT), Outputs(TEACHER), None) == jensen_shannon(STUDENT, TEACHER, beta=0.6)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, math.nan])
def test_a_share_that_leaves_one_side_out_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"expected beta in \(0, 1\), got {beta}: .* take forward_kl or reverse_kl"):
        jensen_shannon(STUDENT, TEACHER, beta=beta)
    with pytest.raises(ValueError, match=r"expected beta in \(0, 1\)"):
        JensenShannon(beta=beta)
