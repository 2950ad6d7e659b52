import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import TTM, kd, standardize_logits, ttm
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def by_loops(student: Tensor, teacher: Tensor, gamma: float, weighted: bool) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, powers = softmax(s), [q**gamma for q in softmax(t)]
        targets = [power / sum(powers) for power in powers]
        kl = sum(q * math.log(q / x) for q, x in zip(targets, p, strict=True))
        total += kl * sum(powers) if weighted else kl
    return total / len(student)


@pytest.mark.parametrize(("weighted", "value"), [(False, 1.6049810092786432), (True, 11.169064549365775)])
def test_value_of_the_authors(weighted: bool, value: float) -> None:
    assert ttm(STUDENT, TEACHER, gamma=0.1, weighted=weighted).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_value_and_gradient_equal_the_formula(gamma: float, weighted: bool) -> None:
    student = STUDENT[:3, :7].clone().requires_grad_()
    loss = ttm(student, TEACHER[:3, :7], gamma=gamma, weighted=weighted)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT[:3, :7], TEACHER[:3, :7], gamma, weighted), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER[:3, :7], gamma, weighted), STUDENT[:3, :7])
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=25)
@given(st.floats(0.01, 3))
def test_the_powers_of_the_probabilities_are_the_softmax_of_the_scaled_logits(gamma: float) -> None:
    powers = torch.softmax(TEACHER, -1) ** gamma
    q = powers / powers.sum(-1, keepdim=True)
    torch.testing.assert_close(q, torch.softmax(gamma * TEACHER, -1))
    # Hence the gradient, p - q, and with a student at temperature 1 plain KD of the scaled teacher.
    student = STUDENT.clone().requires_grad_()
    loss = ttm(student, TEACHER, gamma=gamma)
    loss.backward()
    torch.testing.assert_close(student.grad, (torch.softmax(STUDENT, -1) - q) / 8)
    torch.testing.assert_close(loss, kd(STUDENT, gamma * TEACHER, temperature=1.0))


def test_the_weight_of_a_sample_goes_from_one_for_a_sure_teacher_to_the_number_of_classes() -> None:
    student = STUDENT[:1]
    for teacher, expected in ((torch.eye(10)[:1] * 1e4, 1.0), (torch.zeros(1, 10), 10**0.9)):
        plain, weighted = (ttm(student, teacher.double(), gamma=0.1, weighted=w) for w in (False, True))
        assert (weighted / plain).item() == pytest.approx(expected, rel=1e-9)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    for weighted in (False, True):
        student = STUDENT.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s, w=weighted: ttm(s, TEACHER, weighted=w), student)
        teacher = TEACHER.clone().requires_grad_()
        ttm(student, teacher, weighted=weighted).backward()
        assert teacher.grad is None


@pytest.mark.parametrize("weighted", [False, True])
def test_zero_with_a_gradient_of_zero_where_the_student_has_the_softened_teachers_logits(weighted: bool) -> None:
    student = (0.3 * TEACHER).requires_grad_()
    loss = ttm(student, TEACHER, gamma=0.3, weighted=weighted)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT))
    assert ttm(TEACHER, TEACHER, gamma=0.3, weighted=weighted) > 0.1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_the_limit_and_not_nan(dtype: torch.dtype, weighted: bool) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    loss = ttm(student, teacher, gamma=0.1, weighted=weighted)
    loss.backward()
    assert loss.item() == pytest.approx(2e4 / 2)  # the powers' sum is 1 where the teacher is sure
    assert student.grad.tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_one_sample_counts_as_itself() -> None:
    each = [ttm(STUDENT[i : i + 1], TEACHER[i : i + 1], weighted=True).item() for i in range(8)]
    assert ttm(STUDENT, TEACHER, weighted=True).item() == pytest.approx(sum(each) / 8, rel=1e-12)


@settings(max_examples=25)
@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
    weighted=st.booleans(),
)
def test_shifts_and_the_order_of_samples_and_classes_change_nothing(
    shift: list[float], samples: list[int], classes: list[int], weighted: bool
) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    pair = (STUDENT + moved)[samples][:, classes], (TEACHER - moved)[samples][:, classes]
    expected = ttm(STUDENT, TEACHER, weighted=weighted).item()
    assert ttm(*pair, weighted=weighted).item() == pytest.approx(expected, rel=1e-9)


def test_unlabelled_samples_count_and_ignored_tokens_do_not() -> None:
    whole = TTM()(Outputs(STUDENT), Outputs(TEACHER), None)
    assert TTM()(Outputs(STUDENT), Outputs(TEACHER), torch.full((8,), -100)) == whole
    tokens, student = torch.tensor([[0, -100, 2, 3], [-100, -100, 6, 7]]), STUDENT.clone().requires_grad_()
    kept = tokens.flatten() != -100
    loss = TTM()(Outputs(student.view(2, 4, 10)), Outputs(TEACHER.view(2, 4, 10)), tokens)
    loss.backward()
    torch.testing.assert_close(loss, ttm(STUDENT[kept], TEACHER[kept]))
    assert not student.grad[~kept].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_of_padding_gives_zero_with_a_gradient_of_zero(weighted: bool) -> None:
    student = STUDENT.reshape(2, 4, 10).requires_grad_()
    loss = TTM(weighted=weighted)(Outputs(student), Outputs(TEACHER.view(2, 4, 10)), torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_pixels_count_as_samples() -> None:
    pixels = [x.reshape(2, 2, 2, 10).movedim(-1, 1) for x in (STUDENT, TEACHER)]
    torch.testing.assert_close(ttm(*pixels), ttm(STUDENT, TEACHER))


def test_the_module_is_the_function_at_its_present_settings() -> None:
    loss = TTM(gamma=0.3, weighted=True)
    value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, 0.3, True), rel=1e-12)
    loss.gamma, loss.weighted = 0.7, False
    value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, 0.7, False), rel=1e-12)


def test_standardised_logits_are_compared_where_asked_for() -> None:
    value = TTM(standardize=True)(Outputs(STUDENT), Outputs(TEACHER), None)
    torch.testing.assert_close(value, ttm(standardize_logits(STUDENT), standardize_logits(TEACHER)))


@pytest.mark.parametrize("gamma", [0.0, -0.1, math.nan])
def test_a_power_that_is_not_positive_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"expected gamma > 0, got {gamma}"):
        TTM(gamma=gamma)
    with pytest.raises(ValueError, match="expected gamma > 0"):
        ttm(STUDENT, TEACHER, gamma=gamma)


def test_other_classes_and_a_negative_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        ttm(STUDENT, TEACHER[:, :9])
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        TTM(weight=-1)
