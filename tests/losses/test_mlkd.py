import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import MLKD, batch_correlation, class_correlation, kd, standardize_logits
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)
BOTH = pytest.mark.parametrize("loss", [class_correlation, batch_correlation])


def class_by_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    s, t = ([softmax(row, temperature) for row in x.tolist()] for x in (student, teacher))
    batch, classes = len(s), len(s[0])
    total = 0.0
    for i in range(classes):
        for j in range(classes):
            total += sum(t[b][i] * t[b][j] - s[b][i] * s[b][j] for b in range(batch)) ** 2
    return total / classes


def batch_by_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    s, t = ([softmax(row, temperature) for row in x.tolist()] for x in (student, teacher))
    batch, classes = len(s), len(s[0])
    total = 0.0
    for a in range(batch):
        for b in range(batch):
            total += sum(t[a][i] * t[b][i] - s[a][i] * s[b][i] for i in range(classes)) ** 2
    return total / batch


LOOPS = {class_correlation: class_by_loops, batch_correlation: batch_by_loops}


@pytest.mark.parametrize(
    ("loss", "value"), [(class_correlation, 0.01390000896057289), (batch_correlation, 0.0014340889739154802)]
)
def test_value_of_the_authors(loss, value: float) -> None:
    assert loss(STUDENT, TEACHER, temperature=4.0).item() == pytest.approx(value, rel=1e-12)


@BOTH
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_the_formula(loss, temperature: float) -> None:
    student = STUDENT[:3, :5].clone().requires_grad_()
    value = loss(student, TEACHER[:3, :5], temperature=temperature)
    value.backward()
    assert value.item() == pytest.approx(LOOPS[loss](STUDENT[:3, :5], TEACHER[:3, :5], temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: LOOPS[loss](s, TEACHER[:3, :5], temperature), STUDENT[:3, :5])
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("samples", "classes"), [(2, 5), (4, 10), (3, 5), (5, 3)])
def test_the_class_correlation_is_the_same_for_few_and_many_samples(samples: int, classes: int) -> None:
    student, teacher = STUDENT[:samples, :classes].clone().requires_grad_(), TEACHER[:samples, :classes]
    value = class_correlation(student, teacher, temperature=2.0)
    value.backward()
    assert value.item() == pytest.approx(class_by_loops(student.detach(), teacher, 2.0), rel=1e-12)
    expected = numerical_gradient(lambda s: class_by_loops(s, teacher, 2.0), student.detach())
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


@BOTH
@pytest.mark.parametrize("samples", [3, 8])
def test_a_student_that_is_near_the_teacher_is_told_from_it_in_single_precision(loss, samples: int) -> None:
    student, teacher = (TEACHER + 1e-3 * STUDENT)[:samples].float(), TEACHER[:samples].float()
    exact = loss(student.double(), teacher.double(), temperature=2.0)
    assert loss(student, teacher, temperature=2.0).item() == pytest.approx(exact.item(), rel=1e-3)


def test_no_tensor_of_classes_times_classes_is_kept_for_few_samples() -> None:
    kept = []
    student, teacher = wave((4, 300), 0.7, 0.1).requires_grad_(), wave((4, 300), 1.3, 0.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        MLKD()(Outputs(student), Outputs(teacher), None)
    assert max(kept) <= 4 * 300


@BOTH
def test_gradient_is_right_and_none_is_the_teachers(loss) -> None:
    student = STUDENT[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, TEACHER[:3], temperature=2.0), student)
    teacher = TEACHER.clone().requires_grad_()
    loss(STUDENT.clone().requires_grad_(), teacher, temperature=2.0).backward()
    assert teacher.grad is None


@BOTH
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(loss) -> None:
    student = STUDENT.clone().requires_grad_()
    value = loss(student, STUDENT, temperature=4.0)
    value.backward()
    assert value.item() == 0
    assert not student.grad.any()


@BOTH
def test_extreme_logits_give_the_limit_and_not_nan(loss) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]])
    value = loss(student, teacher, temperature=1.0)
    value.backward()
    # The student says class 0 and class 1, the teacher class 1 twice: diag(1, 1, 0) beside diag(0, 2, 0) over classes,
    # the identity beside all ones over samples.
    assert value.item() == pytest.approx({class_correlation: 2 / 3, batch_correlation: 1.0}[loss])
    assert student.grad.isfinite().all()


@BOTH
def test_a_batch_of_one_and_equal_samples_are_no_special_case(loss) -> None:
    for student, teacher in ((STUDENT[:1], TEACHER[:1]), (STUDENT[:1].expand(4, 10), TEACHER[:1].expand(4, 10))):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, temperature=4.0)
        value.backward()
        assert value.item() == pytest.approx(LOOPS[loss](student, teacher, 4.0), rel=1e-12)
        assert leaf.grad.isfinite().all()


def test_the_class_correlation_grows_with_the_square_of_the_batch_and_the_batch_correlation_with_the_batch() -> None:
    twice = STUDENT.repeat(2, 1), TEACHER.repeat(2, 1)
    for loss, factor in ((class_correlation, 4), (batch_correlation, 2)):
        expected = factor * loss(STUDENT, TEACHER, temperature=4.0).item()
        assert loss(*twice, temperature=4.0).item() == pytest.approx(expected, rel=1e-12)


@BOTH
@settings(max_examples=25)
@given(shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8), temperature=st.floats(0.5, 20))
def test_a_shift_of_a_samples_logits_changes_nothing(loss, shift: list[float], temperature: float) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    expected = pytest.approx(loss(STUDENT, TEACHER, temperature=temperature).item(), rel=1e-8)
    assert loss(STUDENT + moved, TEACHER, temperature=temperature).item() == expected
    assert loss(STUDENT, TEACHER - moved, temperature=temperature).item() == expected


@BOTH
@settings(max_examples=25)
@given(samples=st.permutations(range(8)), classes=st.permutations(range(10)))
def test_the_order_of_samples_and_classes_changes_nothing(loss, samples: list[int], classes: list[int]) -> None:
    shuffled = loss(STUDENT[samples][:, classes], TEACHER[samples][:, classes], temperature=4.0)
    assert shuffled.item() == pytest.approx(loss(STUDENT, TEACHER, temperature=4.0).item(), rel=1e-11)


def test_the_module_sums_the_three_levels_over_its_temperatures() -> None:
    loss = MLKD()
    for temperatures in ((4.0, 3.0, 5.0, 2.0, 6.0), (1.5,)):
        loss.temperatures = temperatures
        expected = sum(
            kd(STUDENT, TEACHER, temperature=t).item()
            + class_by_loops(STUDENT, TEACHER, t)
            + batch_by_loops(STUDENT, TEACHER, t)
            for t in temperatures
        )
        assert loss(Outputs(STUDENT), Outputs(TEACHER), None).item() == pytest.approx(expected, rel=1e-12)


def test_the_module_standardises_the_logits_where_asked_to() -> None:
    value = MLKD(standardize=True)(Outputs(STUDENT), Outputs(TEACHER), None)
    plain = MLKD()(Outputs(standardize_logits(STUDENT)), Outputs(standardize_logits(TEACHER)), None)
    assert value.item() == pytest.approx(plain.item(), rel=1e-13)
    assert value.item() != pytest.approx(MLKD()(Outputs(STUDENT), Outputs(TEACHER), None).item(), rel=0.1)


def test_samples_without_label_count_and_the_samples_of_other_processes_can_be_gathered() -> None:
    ignored = torch.full((8,), -100)
    assert MLKD()(Outputs(STUDENT), Outputs(TEACHER), ignored) == MLKD()(Outputs(STUDENT), Outputs(TEACHER), None)
    assert MLKD.compares_samples
    assert MLKD(gather=True).gather


@BOTH
def test_logits_that_are_no_rows_of_samples_are_refused(loss) -> None:
    with pytest.raises(ValueError, match=r"expected logits \(B, C\), one row a sample, got \(2, 4, 10\)"):
        loss(STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10), temperature=4.0)
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        loss(STUDENT, TEACHER[:, :9], temperature=4.0)


@BOTH
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(loss, temperature: float) -> None:
    with pytest.raises(ValueError, match="expected temperature > 0"):
        loss(STUDENT, TEACHER, temperature=temperature)
    with pytest.raises(ValueError, match=rf"expected temperature > 0, got {temperature}"):
        MLKD(temperatures=(4.0, temperature))


def test_no_temperature_and_a_negative_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one temperature, got none"):
        MLKD(temperatures=())
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        MLKD(weight=-1)
