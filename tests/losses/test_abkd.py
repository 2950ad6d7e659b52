import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import ABKD, alpha_beta_divergence, kd, standardize_logits
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)
GENERAL = [(0.8, 0.3), (0.2, 0.7), (0.5, 0.5), (1.0, 1.0), (2.0, 0.1)]
LIMITS = [(1.0, 0.0), (0.6, 0.0), (0.0, 1.0), (0.0, 0.4), (0.0, 0.0)]


def of_one_class(p: float, q: float, alpha: float, beta: float) -> float:
    """The term of a class with the probability p of the student and q of the teacher."""
    total = alpha + beta
    if total == 0:
        return (math.log(q) - math.log(p)) ** 2 / 2
    if beta == 0:
        return (q**alpha * math.log(q**alpha / p**alpha) - q**alpha + p**alpha) / alpha**2
    if alpha == 0:
        return (p**beta * math.log(p**beta / q**beta) - p**beta + q**beta) / beta**2
    return q**total / (beta * total) + p**total / (alpha * total) - q**alpha * p**beta / (alpha * beta)


def by_loops(student: Tensor, teacher: Tensor, alpha: float, beta: float, temperature: float = 1.0) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(softmax(s, temperature), softmax(t, temperature), strict=True)
        total += sum(of_one_class(p, q, alpha, beta) for p, q in pairs)
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), GENERAL + LIMITS)
def test_value_and_gradient_equal_the_formula_and_its_limits(alpha: float, beta: float, temperature: float) -> None:
    teacher, student = TEACHER[:3, :7], STUDENT[:3, :7].clone().requires_grad_()
    loss = alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT[:3, :7], teacher, alpha, beta, temperature), rel=1e-9)
    expected = numerical_gradient(lambda s: by_loops(s, teacher, alpha, beta, temperature), STUDENT[:3, :7])
    # Central differences are right to some 1e-9 of the value.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limits_are_reached_steadily(alpha: float, beta: float, dtype: torch.dtype) -> None:
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    limit = alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    for small in (1e-2, 1e-4, 1e-6, 1e-9):
        powers = {"alpha": alpha or small, "beta": beta or small}
        near = alpha_beta_divergence(student, teacher, **powers)
        assert near.item() == pytest.approx(limit.item(), rel=20 * small + 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_and_its_reverse_are_at_the_corners(temperature: float) -> None:
    forward = alpha_beta_divergence(STUDENT, TEACHER, alpha=1.0, beta=0.0, temperature=temperature)
    torch.testing.assert_close(forward, kd(STUDENT, TEACHER, temperature=temperature))
    reverse = alpha_beta_divergence(STUDENT, TEACHER, alpha=0.0, beta=1.0, temperature=temperature)
    torch.testing.assert_close(reverse, kd(TEACHER, STUDENT, temperature=temperature))


def test_hellinger_and_euclidean_distance_are_among_them() -> None:
    p, q = torch.softmax(STUDENT, -1), torch.softmax(TEACHER, -1)
    hellinger = 2 * (p.sqrt() - q.sqrt()).square().sum(-1).mean()
    torch.testing.assert_close(alpha_beta_divergence(STUDENT, TEACHER, alpha=0.5, beta=0.5), hellinger)
    euclidean = 0.5 * (p - q).square().sum(-1).mean()
    torch.testing.assert_close(alpha_beta_divergence(STUDENT, TEACHER, alpha=1.0, beta=1.0), euclidean)


@settings(max_examples=25)
@given(alpha=st.floats(0, 3), beta=st.floats(0, 3))
def test_exchanging_the_sides_exchanges_the_powers_and_nothing_is_negative(alpha: float, beta: float) -> None:
    value = alpha_beta_divergence(STUDENT, TEACHER, alpha=alpha, beta=beta)
    torch.testing.assert_close(alpha_beta_divergence(TEACHER, STUDENT, alpha=beta, beta=alpha), value)
    assert value > 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), *LIMITS])
def test_gradient_is_right_and_none_is_the_teachers(alpha: float, beta: float) -> None:
    student = STUDENT[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: alpha_beta_divergence(s, TEACHER[:4], alpha=alpha, beta=beta), student)
    teacher = TEACHER[:4].clone().requires_grad_()
    alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(("alpha", "beta"), GENERAL + LIMITS)
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(alpha: float, beta: float) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = alpha_beta_divergence(student, STUDENT.clone(), alpha=alpha, beta=beta)
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("alpha", "beta", "first"),
    [
        # First sample: each side is sure of another class. Of Σ [...] p_t^(α+β) = 1 and p_s^(α+β) = 1 are left.
        (0.8, 0.3, 1 / (0.8 * 0.3)),
        (0.5, 0.5, 4.0),
        (1.0, 0.0, 2e4),
        (0.0, 1.0, 2e4),
        (0.0, 0.0, 0.5 * 2 * 2e4**2),
    ],
)
def test_extreme_logits_give_the_limit_and_not_nan(alpha: float, beta: float, first: float, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    loss = alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(first / 2, rel=1e-6)
    assert student.grad.isfinite().all()
    if (alpha, beta) == (1.0, 0.0):
        assert student.grad.tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_one_sample_counts_as_itself() -> None:
    each = [alpha_beta_divergence(STUDENT[i : i + 1], TEACHER[i : i + 1], alpha=0.8, beta=0.3).item() for i in range(8)]
    whole = alpha_beta_divergence(STUDENT, TEACHER, alpha=0.8, beta=0.3).item()
    assert whole == pytest.approx(sum(each) / 8, rel=1e-12)


@settings(max_examples=25)
@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_shifts_and_the_order_of_samples_and_classes_change_nothing(
    shift: list[float], samples: list[int], classes: list[int]
) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    pair = (STUDENT + moved)[samples][:, classes], (TEACHER - moved)[samples][:, classes]
    expected = alpha_beta_divergence(STUDENT, TEACHER, alpha=0.8, beta=0.3).item()
    assert alpha_beta_divergence(*pair, alpha=0.8, beta=0.3).item() == pytest.approx(expected, rel=1e-9)


def test_unlabelled_samples_count_and_ignored_tokens_do_not() -> None:
    loss = ABKD(0.8, 0.3)
    whole = loss(Outputs(STUDENT), Outputs(TEACHER), None)
    assert loss(Outputs(STUDENT), Outputs(TEACHER), torch.full((8,), -100)) == whole
    tokens, student = torch.tensor([[0, -100, 2, 3], [-100, -100, 6, 7]]), STUDENT.clone().requires_grad_()
    kept = tokens.flatten() != -100
    value = loss(Outputs(student.view(2, 4, 10)), Outputs(TEACHER.view(2, 4, 10)), tokens)
    value.backward()
    torch.testing.assert_close(value, alpha_beta_divergence(STUDENT[kept], TEACHER[kept], alpha=0.8, beta=0.3))
    assert not student.grad[~kept].any()


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.0, 0.0)])
def test_a_batch_of_padding_gives_zero_with_a_gradient_of_zero(alpha: float, beta: float) -> None:
    student = STUDENT.reshape(2, 4, 10).requires_grad_()
    loss = ABKD(alpha, beta)(Outputs(student), Outputs(TEACHER.view(2, 4, 10)), torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_pixels_count_as_samples() -> None:
    pixels = [x.reshape(2, 2, 2, 10).movedim(-1, 1) for x in (STUDENT, TEACHER)]
    expected = alpha_beta_divergence(STUDENT, TEACHER, alpha=0.8, beta=0.3)
    torch.testing.assert_close(alpha_beta_divergence(*pixels, alpha=0.8, beta=0.3), expected)


def test_the_module_is_the_function_at_its_present_settings() -> None:
    loss = ABKD(alpha=0.8, beta=0.3, temperature=4.0)
    value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, 0.8, 0.3, 4.0), rel=1e-10)
    loss.alpha, loss.beta, loss.temperature = 0.2, 0.7, 1.5
    value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, 0.2, 0.7, 1.5), rel=1e-10)


def test_standardised_logits_are_compared_where_asked_for() -> None:
    value = ABKD(0.8, 0.3, standardize=True)(Outputs(STUDENT), Outputs(TEACHER), None)
    expected = alpha_beta_divergence(standardize_logits(STUDENT), standardize_logits(TEACHER), alpha=0.8, beta=0.3)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.5, "beta": 1.0}, "expected alpha >= 0, got -0.5: a negative power divides by probabilities"),
        ({"alpha": 1.2, "beta": -0.2}, "expected beta >= 0, got -0.2: a negative power divides by probabilities"),
        ({"alpha": math.nan, "beta": 1.0}, "expected alpha >= 0, got nan"),
        ({"alpha": 1.0, "beta": 0.0, "temperature": 0.0}, "expected temperature > 0, got 0.0"),
    ],
)
def test_powers_that_are_negative_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ABKD(**options)
    with pytest.raises(ValueError, match=message):
        alpha_beta_divergence(STUDENT, TEACHER, **options)


def test_other_classes_and_a_negative_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        alpha_beta_divergence(STUDENT, TEACHER[:, :9], alpha=1.0, beta=1.0)
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        ABKD(1.0, 1.0, weight=-1)


def test_a_learnt_temperature_gets_its_gradient() -> None:
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: alpha_beta_divergence(STUDENT, TEACHER, alpha=0.8, beta=0.3, temperature=t), temperature
    )
