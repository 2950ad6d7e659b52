"""What the divergences between next-token distributions have in common."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    SymmetricKL,
    TotalVariation,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    symmetric_kl,
    total_variation,
)
from tests.losses.reference import wave

STUDENT, TEACHER = wave((2, 4, 10), 0.7, 0.1), wave((2, 4, 10), 1.3, 0.5)
TARGET = torch.tensor([[1, -100, 0, 3], [-100, -100, 7, 2]])
COUNTED = TARGET != -100
LOSSES = {
    forward_kl: ForwardKL,
    reverse_kl: ReverseKL,
    symmetric_kl: SymmetricKL,
    total_variation: TotalVariation,
    jensen_shannon: JensenShannon,
    skewed_forward_kl: SkewedForwardKL,
    skewed_reverse_kl: SkewedReverseKL,
}
POWER_OF_T = {loss: 1 if loss is total_variation else 2 for loss in LOSSES}
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def graded(loss, student: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    """The loss's value, and its gradient with respect to the student."""
    student = student.clone().requires_grad_()
    value = loss(student, *args, **options)
    value.backward()
    return value.detach(), student.grad


@every_loss
def test_ignored_tokens_do_not_count(loss) -> None:
    value, gradient = graded(loss, STUDENT, TEACHER, TARGET)
    alone, its_gradient = graded(loss, STUDENT[COUNTED], TEACHER[COUNTED])
    assert value.item() == pytest.approx(alone.item(), rel=1e-13)
    torch.testing.assert_close(gradient[COUNTED], its_gradient)
    assert not gradient[~COUNTED].any()


@every_loss
def test_another_ignore_index_can_be_named(loss) -> None:
    target = torch.where(COUNTED, TARGET, 0)  # zero stands for padding as well as for the class of one token
    value = loss(STUDENT, TEACHER, target, ignore_index=0)
    assert value.item() == pytest.approx(loss(STUDENT[target != 0], TEACHER[target != 0]).item(), rel=1e-13)


@every_loss
def test_zero_with_a_gradient_of_zero_where_no_token_counts(loss) -> None:
    value, gradient = graded(loss, STUDENT, TEACHER, torch.full_like(TARGET, -100))
    assert value == 0
    assert gradient.shape == STUDENT.shape
    assert not gradient.any()


@every_loss
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(loss) -> None:
    value, gradient = graded(loss, STUDENT, STUDENT.clone(), temperature=2.0)
    assert value.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(STUDENT))


@every_loss
def test_positive_where_they_differ(loss) -> None:
    assert all(loss(STUDENT[i, j : j + 1], TEACHER[i, j : j + 1]) > 0.01 for i in range(2) for j in range(4))


@every_loss
def test_a_token_counts_as_itself(loss) -> None:
    each = [loss(STUDENT[i, j : j + 1], TEACHER[i, j : j + 1]).item() for i in range(2) for j in range(4)]
    assert loss(STUDENT, TEACHER).item() == pytest.approx(sum(each) / 8, rel=1e-13)


@every_loss
def test_pixels_count_as_samples(loss) -> None:
    student, teacher = wave((2, 5, 3, 4), 0.7, 0.1), wave((2, 5, 3, 4), 1.3, 0.5)
    target = torch.arange(24).reshape(2, 3, 4)
    pixels = student.permute(0, 2, 3, 1).reshape(-1, 5), teacher.permute(0, 2, 3, 1).reshape(-1, 5)
    assert loss(student, teacher).item() == pytest.approx(loss(*pixels).item(), rel=1e-13)
    without = loss(student, teacher, target, ignore_index=7)
    assert without.item() == pytest.approx(loss(*pixels, target.flatten(), ignore_index=7).item(), rel=1e-13)
    assert without.item() != pytest.approx(loss(student, teacher).item(), rel=1e-6)


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_is_right(loss, temperature: float) -> None:
    student = STUDENT[:, :2, :5].clone().requires_grad_()
    teacher, target = TEACHER[:, :2, :5], torch.tensor([[0, -100], [1, 1]])
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, target, temperature=temperature), student)


@every_loss
def test_teacher_gets_no_gradient(loss) -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss(student, teacher, TARGET).backward()
    assert student.grad.any()
    assert teacher.grad is None


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extreme_logits(loss, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4], [1e4, 1e4, -1e4]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [-1e4, -1e4, 1e4]], dtype=dtype)
    value, gradient = graded(loss, student, teacher)
    assert value.isfinite()
    assert value > 0.1
    assert gradient.isfinite().all()
    assert not gradient[1].any()  # both are sure of the same token


@every_loss
def test_a_token_that_neither_can_say_adds_nothing(loss) -> None:
    padded = torch.full((2, 4, 3), -torch.inf, dtype=torch.float64)
    value, gradient = graded(loss, torch.cat((STUDENT, padded), -1), torch.cat((TEACHER, padded), -1), temperature=2.0)
    expected, its_gradient = graded(loss, STUDENT, TEACHER, temperature=2.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(gradient[..., :10], its_gradient)
    assert not gradient[..., 10:].any()


@every_loss
def test_half_precision_under_autocast_is_right_to_its_digits(loss) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = graded(loss, STUDENT.float(), TEACHER.float(), TARGET)
    expected, its_gradient = graded(loss, STUDENT, TEACHER, TARGET)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), its_gradient, rtol=1e-4, atol=1e-6)


@every_loss
@settings(max_examples=25)
@given(shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8), temperature=st.floats(0.5, 20))
def test_a_shift_of_a_tokens_logits_changes_nothing(loss, shift: list[float], temperature: float) -> None:
    moved = torch.tensor(shift, dtype=torch.float64).reshape(2, 4, 1)
    expected = pytest.approx(loss(STUDENT, TEACHER, temperature=temperature).item(), rel=1e-9)
    assert loss(STUDENT + moved, TEACHER, temperature=temperature).item() == expected
    assert loss(STUDENT, TEACHER + moved, temperature=temperature).item() == expected


@every_loss
@settings(max_examples=25)
@given(tokens=st.permutations(range(4)), classes=st.permutations(range(10)))
def test_the_order_of_tokens_and_of_the_vocabulary_changes_nothing(loss, tokens, classes) -> None:
    shuffled = loss(STUDENT[:, tokens][..., classes], TEACHER[:, tokens][..., classes], TARGET[:, tokens])
    assert shuffled.item() == pytest.approx(loss(STUDENT, TEACHER, TARGET).item(), rel=1e-12)


@every_loss
@settings(max_examples=25)
@given(st.floats(0.1, 50))
def test_the_temperature_softens_both_sides_and_its_factor_makes_up_for_it(loss, temperature: float) -> None:
    softened = temperature ** POWER_OF_T[loss] * loss(STUDENT / temperature, TEACHER / temperature)
    assert loss(STUDENT, TEACHER, temperature=temperature).item() == pytest.approx(softened.item(), rel=1e-9)


@every_loss
def test_gradient_stays_of_one_size_when_the_temperature_changes(loss) -> None:
    sizes = [graded(loss, STUDENT, TEACHER, temperature=temperature)[1].norm() for temperature in (16.0, 64.0, 256.0)]
    assert sizes[0].item() == pytest.approx(sizes[2].item(), rel=0.1)
    assert sizes[1].item() == pytest.approx(sizes[2].item(), rel=0.05)


@every_loss
def test_the_module_is_the_function_at_its_present_settings(loss) -> None:
    module = LOSSES[loss](temperature=2.0)
    for temperature in (2.0, 3.0):
        module.temperature = temperature
        value = module(Outputs(STUDENT), Outputs(TEACHER), TARGET)
        assert value == loss(STUDENT, TEACHER, TARGET, temperature=temperature)
    assert module(Outputs(STUDENT), Outputs(TEACHER), None) == loss(STUDENT, TEACHER, temperature=3.0)


@every_loss
def test_an_image_without_label_counts(loss) -> None:
    student, teacher = STUDENT.flatten(0, 1), TEACHER.flatten(0, 1)
    value = LOSSES[loss]()(Outputs(student), Outputs(teacher), TARGET.flatten())
    assert value == loss(student, teacher)


@every_loss
def test_standardised_logits_are_compared_where_asked_for(loss) -> None:
    def standardised(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True)

    value = LOSSES[loss](standardize=True)(Outputs(STUDENT), Outputs(TEACHER), TARGET)
    assert value.item() == pytest.approx(loss(standardised(STUDENT), standardised(TEACHER), TARGET).item(), rel=1e-6)


@every_loss
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(loss, temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"expected temperature > 0, got {temperature}"):
        LOSSES[loss](temperature=temperature)
    with pytest.raises(ValueError, match=r"expected temperature > 0"):
        loss(STUDENT, TEACHER, temperature=temperature)


@every_loss
def test_other_classes_and_other_targets_are_refused(loss) -> None:
    with pytest.raises(ValueError, match=r"student logits \(2, 4, 10\) and teacher logits \(2, 4, 9\) differ"):
        loss(STUDENT, TEACHER[..., :9])
    with pytest.raises(ValueError, match=r"expected a target \(2, 4\) for logits \(2, 4, 10\), got \(2, 3\)"):
        loss(STUDENT, TEACHER, TARGET[:, :3])
