import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import DeiTHard, DeiTSoft, deit_hard, deit_soft, kd, standardize_logits
from kd_lightning.outputs import TopK
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    values = [
        -math.log(softmax(s)[max(range(len(t)), key=t.__getitem__)])
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return sum(values) / len(values)


def test_value_of_the_authors() -> None:
    assert deit_hard(STUDENT, TEACHER).item() == pytest.approx(3.9585839346636944, rel=1e-13)


def test_value_and_gradient_equal_the_formula() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = DeiTHard()(Outputs(student), Outputs(TEACHER), None)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    # Central differences are right to some 1e-9.
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: deit_hard(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    deit_hard(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_where_the_student_equals_the_teacher_its_own_confidence_is_left() -> None:
    confidence = torch.softmax(STUDENT, -1).max(-1).values
    torch.testing.assert_close(deit_hard(STUDENT, STUDENT), -confidence.log().mean())


def test_labels_that_contradict_the_teacher_change_nothing() -> None:
    contradiction = (TEACHER.argmax(-1) + 1) % 10
    with_labels = DeiTHard()(Outputs(STUDENT), Outputs(TEACHER), contradiction)
    assert with_labels == DeiTHard()(Outputs(STUDENT), Outputs(TEACHER), None)


def test_tokens_count_as_samples() -> None:
    assert deit_hard(STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10)) == deit_hard(STUDENT, TEACHER)


def test_of_tokens_those_that_are_ignored_do_not_count() -> None:
    student, teacher = STUDENT.reshape(2, 4, 10).clone().requires_grad_(), TEACHER.reshape(2, 4, 10)
    target = torch.tensor([[1, -100, 0, 3], [-100, -100, 7, 2]])
    best = teacher.log_softmax(-1).topk(3)
    for known in (Outputs(teacher), TopK.of(best.indices, best.values)):
        loss = DeiTHard()(Outputs(student), known, target)
        kept = [0, 2, 3, 6, 7]
        assert loss.item() == pytest.approx(deit_hard(STUDENT[kept], TEACHER[kept]).item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient[target != -100].any()
        assert not gradient[target == -100].any()
        nothing = DeiTHard()(Outputs(student), known, torch.full((2, 4), -100))
        (gradient,) = torch.autograd.grad(nothing, student)
        assert nothing == 0
        assert not gradient.any()


def test_extreme_logits_and_a_batch_of_one_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = deit_hard(student, torch.tensor([[-1e4, 1e4, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad.tolist() == [[1.0, -1.0, 0.0]]


@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    scale=st.floats(0.1, 10),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_only_the_teachers_choice_counts(
    shift: list[float], scale: float, samples: list[int], classes: list[int]
) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    other = deit_hard((STUDENT + moved)[samples][:, classes], (TEACHER * scale + moved)[samples][:, classes])
    assert other.item() == pytest.approx(deit_hard(STUDENT, TEACHER).item(), rel=1e-9)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        deit_hard(STUDENT, TEACHER[:, :9])


def soft_by_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(softmax(s, temperature), softmax(t, temperature), strict=True)
        total += sum(q * math.log(q / p) for p, q in pairs)
    return temperature**2 * total / student.numel()


def test_soft_value_of_the_authors() -> None:
    assert deit_soft(STUDENT, TEACHER, temperature=3.0).item() == pytest.approx(0.40587549624672076, rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_value_and_gradient_equal_the_formula(temperature: float) -> None:
    student = STUDENT[:3, :7].clone().requires_grad_()
    loss = deit_soft(student, TEACHER[:3, :7], temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(soft_by_loops(STUDENT[:3, :7], TEACHER[:3, :7], temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: soft_by_loops(s, TEACHER[:3, :7], temperature), STUDENT[:3, :7])
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_soft_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: deit_soft(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    deit_soft(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_soft_is_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = deit_soft(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT))


def test_soft_divides_by_the_classes_of_samples_tokens_and_pixels() -> None:
    expected = kd(STUDENT, TEACHER, temperature=3.0) / 10
    torch.testing.assert_close(deit_soft(STUDENT, TEACHER), expected)
    torch.testing.assert_close(deit_soft(STUDENT.reshape(2, 4, 10), TEACHER.reshape(2, 4, 10)), expected)
    pixels = [x.reshape(2, 2, 2, 10).movedim(-1, 1) for x in (STUDENT, TEACHER)]
    torch.testing.assert_close(deit_soft(*pixels), expected)


def test_soft_gives_the_limit_and_not_nan_for_extreme_logits_and_a_batch_of_one() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0, -1e4]], requires_grad=True)
    loss = deit_soft(student, torch.tensor([[-1e4, 1e4, 0.0, -1e4]]), temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4 / 4)
    assert student.grad.tolist() == [[0.25, -0.25, 0.0, 0.0]]


@settings(max_examples=25)
@given(
    shift=st.lists(st.floats(-20, 20), min_size=8, max_size=8),
    samples=st.permutations(range(8)),
    classes=st.permutations(range(10)),
)
def test_soft_does_not_see_shifts_and_the_order_of_samples_and_classes(
    shift: list[float], samples: list[int], classes: list[int]
) -> None:
    moved = torch.tensor(shift, dtype=torch.float64)[:, None]
    other = deit_soft((STUDENT + moved)[samples][:, classes], (TEACHER - moved)[samples][:, classes])
    assert other.item() == pytest.approx(deit_soft(STUDENT, TEACHER).item(), rel=1e-9)


def test_soft_counts_unlabelled_samples_but_no_ignored_tokens() -> None:
    whole = DeiTSoft()(Outputs(STUDENT), Outputs(TEACHER), None)
    assert DeiTSoft()(Outputs(STUDENT), Outputs(TEACHER), torch.full((8,), -100)) == whole
    tokens, student = torch.tensor([[0, -100, 2, 3], [-100, -100, 6, 7]]), STUDENT.clone().requires_grad_()
    kept = tokens.flatten() != -100
    loss = DeiTSoft()(Outputs(student.view(2, 4, 10)), Outputs(TEACHER.view(2, 4, 10)), tokens)
    loss.backward()
    torch.testing.assert_close(loss, deit_soft(STUDENT[kept], TEACHER[kept]))
    assert not student.grad[~kept].any()


def test_soft_is_zero_with_a_gradient_of_zero_for_a_batch_of_padding() -> None:
    student = STUDENT.reshape(2, 4, 10).requires_grad_()
    loss = DeiTSoft()(Outputs(student), Outputs(TEACHER.view(2, 4, 10)), torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_the_soft_module_is_the_function_at_its_present_settings() -> None:
    loss = DeiTSoft(temperature=2.0)
    for temperature in (2.0, 5.0):
        loss.temperature = temperature
        value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
        assert value.item() == pytest.approx(soft_by_loops(STUDENT, TEACHER, temperature), rel=1e-12)
    standardised = DeiTSoft(standardize=True)(Outputs(STUDENT), Outputs(TEACHER), None)
    torch.testing.assert_close(standardised, deit_soft(standardize_logits(STUDENT), standardize_logits(TEACHER)))


def test_soft_refuses_other_classes_and_what_is_not_positive() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        deit_soft(STUDENT, TEACHER[:, :9])
    with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
        deit_soft(STUDENT, TEACHER, temperature=0)
    with pytest.raises(ValueError, match="expected temperature > 0, got nan"):
        DeiTSoft(temperature=math.nan)
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        DeiTSoft(weight=-1)


def test_a_learnt_temperature_gets_its_gradient() -> None:
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: deit_soft(STUDENT, TEACHER, temperature=t), temperature)
