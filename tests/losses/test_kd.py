import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import KD, kd
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def kd_by_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        soft_s, soft_t = softmax(s, temperature), softmax(t, temperature)
        total += sum(q * math.log(q / p) for p, q in zip(soft_s, soft_t, strict=True))
    return temperature**2 * total / len(student)


def test_value_of_the_authors() -> None:
    assert kd(STUDENT, TEACHER, temperature=4.0).item() == pytest.approx(4.263026881781915, rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 16.0])
def test_value_and_gradient_equal_the_formula(temperature: float) -> None:
    student = STUDENT[:3].clone().requires_grad_()
    loss = kd(student, TEACHER[:3], temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(kd_by_loops(STUDENT[:3], TEACHER[:3], temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: kd_by_loops(s, TEACHER[:3], temperature), STUDENT[:3])
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_t_times_the_difference_of_the_soft_targets() -> None:
    student = STUDENT.clone().requires_grad_()
    kd(student, TEACHER, temperature=5.0).backward()
    difference = torch.softmax(STUDENT / 5, -1) - torch.softmax(TEACHER / 5, -1)
    torch.testing.assert_close(student.grad, 5 * difference / len(STUDENT))


def test_gradient_stays_of_one_size_when_the_temperature_changes() -> None:
    sizes = []
    for temperature in (4.0, 16.0, 64.0):
        student = STUDENT.clone().requires_grad_()
        kd(student, TEACHER, temperature=temperature).backward()
        sizes.append(student.grad.norm().item())
    # The limit of high temperatures, (z_s - z_t) / (B·C) for centred logits, is reached to some percent at T=16.
    assert sizes[1] == pytest.approx(sizes[2], rel=0.02)
    assert sizes[0] == pytest.approx(sizes[2], rel=0.2)


def test_gradient_is_right() -> None:
    assert torch.autograd.gradcheck(lambda s: kd(s, TEACHER, temperature=2.0), STUDENT.clone().requires_grad_())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(temperature: float) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = kd(student, STUDENT.clone(), temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_the_limit_and_not_nan(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    loss = kd(student, teacher, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4 / 2)  # log p of the teacher's class is -2e4 in the first sample, 0 beside
    assert student.grad.tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_one_sample_counts_as_itself() -> None:
    each = [kd(STUDENT[i : i + 1], TEACHER[i : i + 1], temperature=4.0).item() for i in range(8)]
    assert kd(STUDENT, TEACHER, temperature=4.0).item() == pytest.approx(sum(each) / 8, rel=1e-13)


def test_tokens_count_as_samples() -> None:
    student, teacher = STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10)
    assert kd(student, teacher, temperature=4.0) == kd(STUDENT, TEACHER, temperature=4.0)


def test_ignored_tokens_do_not_count_and_the_mean_is_over_those_that_do() -> None:
    student, teacher = STUDENT.reshape(2, 4, 10).clone().requires_grad_(), TEACHER.reshape(2, 4, 10)
    target = torch.tensor([[1, -100, 0, 3], [-100, -100, 7, 2]])
    for loss in (
        kd(student, teacher, target, temperature=4.0),
        KD(temperature=4.0)(Outputs(student), Outputs(teacher), target),
    ):
        kept = [0, 2, 3, 6, 7]
        assert loss.item() == pytest.approx(kd_by_loops(STUDENT[kept], TEACHER[kept], 4.0), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, student)
        alone = STUDENT[kept].clone().requires_grad_()
        kd(alone, TEACHER[kept], temperature=4.0).backward()
        torch.testing.assert_close(gradient[target != -100], alone.grad)
        assert not gradient[target == -100].any()


def test_zero_with_a_gradient_of_zero_where_every_token_is_ignored() -> None:
    student, teacher = STUDENT.reshape(2, 4, 10).clone().requires_grad_(), TEACHER.reshape(2, 4, 10)
    loss = KD()(Outputs(student), Outputs(teacher), torch.full((2, 4), -100))
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (2, 4, 10)
    assert not student.grad.any()


def test_images_without_label_count() -> None:
    target = torch.tensor([3, -100, -100, 0, -100, 1, 2, -100])
    for labels in (target, torch.full((8,), -100)):
        value = KD(temperature=4.0)(Outputs(STUDENT), Outputs(TEACHER), labels)
        assert value.item() == pytest.approx(kd_by_loops(STUDENT, TEACHER, 4.0), rel=1e-12)


def test_pixels_count_as_samples_whether_labelled_or_not() -> None:
    student, teacher = wave((2, 5, 3, 4), 0.7, 0.1).requires_grad_(), wave((2, 5, 3, 4), 1.3, 0.5)
    pixels = [
        torch.stack([z[b, :, h, w] for b in range(2) for h in range(3) for w in range(4)]) for z in (student, teacher)
    ]
    expected = kd_by_loops(*pixels, 4.0)
    assert kd(student, teacher, temperature=4.0).item() == pytest.approx(expected, rel=1e-12)
    target = torch.full((2, 3, 4), -100)
    value = KD(temperature=4.0)(Outputs(student), Outputs(teacher), target)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, student)
    (expected_gradient,) = torch.autograd.grad(kd(*pixels, temperature=4.0), student)
    torch.testing.assert_close(gradient, expected_gradient)


def test_teacher_gets_no_gradient() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    kd(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@given(shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8), temperature=st.floats(0.5, 20))
def test_a_shift_of_a_samples_logits_changes_nothing(shift: list[float], temperature: float) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    expected = pytest.approx(kd(STUDENT, TEACHER, temperature=temperature).item(), rel=1e-9)
    assert kd(STUDENT + moved, TEACHER, temperature=temperature).item() == expected
    assert kd(STUDENT, TEACHER + moved, temperature=temperature).item() == expected


@given(samples=st.permutations(range(8)), classes=st.permutations(range(10)))
def test_the_order_of_samples_and_classes_changes_nothing(samples: list[int], classes: list[int]) -> None:
    shuffled = kd(STUDENT[samples][:, classes], TEACHER[samples][:, classes], temperature=4.0)
    assert shuffled.item() == pytest.approx(kd(STUDENT, TEACHER, temperature=4.0).item(), rel=1e-12)


@given(st.floats(0.1, 50))
def test_both_sides_are_softened_and_the_factor_is_the_square(temperature: float) -> None:
    softened = kd(STUDENT / temperature, TEACHER / temperature, temperature=1.0)
    assert kd(STUDENT, TEACHER, temperature=temperature).item() == pytest.approx(
        temperature**2 * softened.item(), rel=1e-9
    )


def test_the_module_is_the_function_at_its_present_temperature() -> None:
    loss = KD(temperature=4.0)
    for temperature in (4.0, 2.0):
        loss.temperature = temperature
        value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
        assert value.item() == pytest.approx(kd_by_loops(STUDENT, TEACHER, temperature), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"expected temperature > 0, got {temperature}"):
        KD(temperature=temperature)
    with pytest.raises(ValueError, match="expected temperature > 0"):
        kd(STUDENT, TEACHER, temperature=temperature)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        kd(STUDENT, TEACHER[:, :9])


@pytest.mark.parametrize("weight", [-0.5, math.nan])
def test_a_negative_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"expected weight >= 0, got {weight}"):
        KD(weight=weight)
