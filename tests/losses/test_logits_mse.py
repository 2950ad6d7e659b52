import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import LogitsMSE, kd, logits_mse, standardize_logits
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    squares = [
        (a - b) ** 2 for s, t in zip(student.tolist(), teacher.tolist(), strict=True) for a, b in zip(s, t, strict=True)
    ]
    return sum(squares) / len(squares)


def test_value_and_gradient_equal_the_formula() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = logits_mse(student, TEACHER)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    torch.testing.assert_close(student.grad, 2 * (STUDENT - TEACHER) / 80)
    # Central differences are right to some 1e-9.
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: logits_mse(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    logits_mse(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = logits_mse(student, STUDENT)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_kd_tends_to_half_of_it_for_centred_logits() -> None:
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (STUDENT, TEACHER))
    assert kd(student, teacher, temperature=1e4).item() == pytest.approx(
        logits_mse(student, teacher).item() / 2, rel=1e-3
    )
    assert kd(student, teacher, temperature=1.0).item() != pytest.approx(
        logits_mse(student, teacher).item() / 2, rel=0.1
    )


def test_extreme_logits_and_a_batch_of_one_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0, 0.0]], requires_grad=True)
    loss = logits_mse(student, torch.tensor([[-1e4, 1e4, 0.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e8)
    assert student.grad.tolist() == [[1e4, -1e4, 0.0, 0.0]]


@settings(max_examples=25)
@given(
    shift=st.floats(-20, 20),
    scale=st.floats(0.1, 10),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_order_and_a_common_shift_change_nothing_and_the_size_counts_squared(
    shift: float, scale: float, samples: list[int], classes: list[int]
) -> None:
    pair = [(scale * x + shift)[samples][:, classes] for x in (STUDENT, TEACHER)]
    assert logits_mse(*pair).item() == pytest.approx(scale**2 * logits_mse(STUDENT, TEACHER).item(), rel=1e-9)


def test_unlabelled_samples_count_and_ignored_tokens_do_not() -> None:
    whole = LogitsMSE()(Outputs(STUDENT), Outputs(TEACHER), None)
    assert LogitsMSE()(Outputs(STUDENT), Outputs(TEACHER), torch.full((8,), -100)) == whole
    tokens, student = torch.tensor([[0, -100, 2, 3], [-100, -100, 6, 7]]), STUDENT.clone().requires_grad_()
    kept = tokens.flatten() != -100
    loss = LogitsMSE()(Outputs(student.view(2, 4, 10)), Outputs(TEACHER.view(2, 4, 10)), tokens)
    loss.backward()
    torch.testing.assert_close(loss, logits_mse(STUDENT[kept], TEACHER[kept]))
    assert not student.grad[~kept].any()


def test_a_batch_of_padding_gives_zero_with_a_gradient_of_zero() -> None:
    student = STUDENT.reshape(2, 4, 10).requires_grad_()
    loss = LogitsMSE()(Outputs(student), Outputs(TEACHER.view(2, 4, 10)), torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_pixels_count_as_samples() -> None:
    pixels = [x.reshape(2, 2, 2, 10).movedim(-1, 1) for x in (STUDENT, TEACHER)]
    torch.testing.assert_close(logits_mse(*pixels), logits_mse(STUDENT, TEACHER))


def test_the_module_is_the_function_on_standardised_logits_where_asked_for() -> None:
    pair = Outputs(STUDENT), Outputs(TEACHER)
    assert LogitsMSE()(*pair, None).item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    expected = by_loops(standardize_logits(STUDENT), standardize_logits(TEACHER))
    assert LogitsMSE(standardize=True)(*pair, None).item() == pytest.approx(expected, rel=1e-12)


def test_other_classes_and_a_negative_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        logits_mse(STUDENT, TEACHER[:, :9])
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        LogitsMSE(weight=-1)
