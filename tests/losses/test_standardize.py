import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import DIST, DKD, KD, DistillationLoss, dist, dkd, kd, standardize_logits
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER, LABELS = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5), torch.arange(8)


def by_loops(logits: list[float]) -> list[float]:
    mean = sum(logits) / len(logits)
    std = math.sqrt(sum((z - mean) ** 2 for z in logits) / (len(logits) - 1))
    return [(z - mean) / (1e-7 + std) for z in logits]


def test_value_of_the_authors() -> None:
    value = kd(standardize_logits(STUDENT), standardize_logits(TEACHER), temperature=2.0)
    assert value.item() == pytest.approx(0.870217174442623, rel=1e-12)
    assert KD(temperature=2.0, standardize=True)(Outputs(STUDENT), Outputs(TEACHER), None) == value


def test_value_and_gradient_equal_the_formula() -> None:
    factors = wave((3, 7), 0.9, 0.2)
    logits = STUDENT[:3, :7].clone().requires_grad_()
    standardised = standardize_logits(logits)
    (standardised * factors).sum().backward()
    for row, z in zip(standardised.tolist(), STUDENT[:3, :7].tolist(), strict=True):
        assert row == pytest.approx(by_loops(z), rel=1e-12)

    def weighted_sum(x: Tensor) -> float:
        pairs = zip(x.tolist(), factors.tolist(), strict=True)
        return sum(a * b for z, f in pairs for a, b in zip(by_loops(z), f, strict=True))

    # Central differences are right to some 1e-9.
    torch.testing.assert_close(logits.grad, numerical_gradient(weighted_sum, STUDENT[:3, :7]), rtol=1e-6, atol=1e-8)


def test_gradient_is_right() -> None:
    assert torch.autograd.gradcheck(standardize_logits, STUDENT.clone().requires_grad_())


def test_the_mean_is_zero_and_the_standard_deviation_one() -> None:
    standardised = standardize_logits(STUDENT)
    torch.testing.assert_close(standardised.mean(-1), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(standardised.std(-1), torch.ones(8, dtype=torch.float64))


@settings(max_examples=25)
@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    scale=st.lists(st.floats(0.1, 10), min_size=8, max_size=8),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_each_samples_shift_and_scale_change_nothing_and_its_order_stays(
    shift: list[float], scale: list[float], samples: list[int], classes: list[int]
) -> None:
    moved, scaled = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (shift, scale))
    other = standardize_logits((STUDENT * scaled + moved)[samples][:, classes])
    # Up to the 1e-7 beside the standard deviation.
    torch.testing.assert_close(other, standardize_logits(STUDENT)[samples][:, classes], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7, 123.4, 9999.9])
def test_constant_logits_become_zero_with_a_finite_gradient(constant: float, dtype: torch.dtype) -> None:
    logits = torch.full((2, 10), constant, dtype=dtype, requires_grad=True)
    standardised = standardize_logits(logits)
    kd(standardised, TEACHER[:2].to(dtype)).backward()
    # In float32 the mean of ten times 9999.9 is off by 1e-3, which must not be divided by 1e-7.
    torch.testing.assert_close(standardised, torch.zeros_like(logits), rtol=0, atol=1e-2)
    assert logits.grad.isfinite().all()


def test_extreme_logits_and_one_sample_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    standardised = standardize_logits(logits)
    standardised.square().sum().backward()
    assert standardised.tolist() == [[1.0, -1.0, 0.0]]
    assert logits.grad.isfinite().all()


def test_tokens_and_pixels_are_standardised_over_the_classes() -> None:
    expected = standardize_logits(STUDENT)
    torch.testing.assert_close(standardize_logits(STUDENT.reshape(2, 4, 10)), expected.reshape(2, 4, 10))
    pixels = STUDENT.reshape(2, 2, 2, 10).movedim(-1, 1)
    torch.testing.assert_close(standardize_logits(pixels), expected.reshape(2, 2, 2, 10).movedim(-1, 1))


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (KD(temperature=2.0, standardize=True), lambda s, t: kd(s, t, temperature=2.0)),
        (DKD(temperature=2.0, standardize=True), lambda s, t: dkd(s, t, LABELS, temperature=2.0)),
        (DIST(temperature=2.0, standardize=True), lambda s, t: dist(s, t, temperature=2.0)),
    ],
    ids=["KD", "DKD", "DIST"],
)
def test_a_module_that_standardises_is_its_function_on_standardised_logits(loss: DistillationLoss, function) -> None:
    modules, functions = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    value = loss(Outputs(modules), Outputs(TEACHER), LABELS)
    expected = function(standardize_logits(functions), standardize_logits(TEACHER))
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(modules.grad, functions.grad)
    # What standardising is for: the size of the student's logits does not count, and plain losses see it.
    larger = loss(Outputs(3 * STUDENT + 1), Outputs(TEACHER), LABELS)
    torch.testing.assert_close(larger, value.detach(), rtol=1e-6, atol=0)
    assert abs(function(3 * STUDENT + 1, TEACHER) - function(STUDENT, TEACHER)) > 1e-3
