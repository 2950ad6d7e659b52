import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import ULD, sorted_probabilities
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((2, 4, 10), 0.7, 0.1), wave((2, 4, 7), 1.3, 0.5)
TARGET = torch.tensor([[1, -100, 0, 3], [-100, -100, 7, 2]])
COUNTED = TARGET != -100


def by_loops(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p_s, p_t = (sorted(softmax(z, temperature), reverse=True) for z in (s, t))
        for i in range(max(len(p_s), len(p_t))):
            total += abs((p_s[i] if i < len(p_s) else 0) - (p_t[i] if i < len(p_t) else 0))
    return temperature * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("width", [4, 10, 13])
def test_value_and_gradient_equal_the_formula(width: int, temperature: float) -> None:
    teacher = wave((4, width), 1.3, 0.5)
    student = STUDENT[0].clone().requires_grad_()
    value = sorted_probabilities(student, teacher, temperature=temperature)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT[0], teacher, temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, teacher, temperature), STUDENT[0])
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_ignored_tokens_do_not_count() -> None:
    student = STUDENT.clone().requires_grad_()
    value = sorted_probabilities(student, TEACHER, TARGET)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT[COUNTED], TEACHER[COUNTED]), rel=1e-12)
    assert student.grad[COUNTED].any(-1).all()
    assert not student.grad[~COUNTED].any()
    assert sorted_probabilities(STUDENT, TEACHER, torch.where(COUNTED, TARGET, -1), ignore_index=-1) == value


def test_zero_with_a_gradient_of_zero_where_no_token_counts() -> None:
    student = STUDENT.clone().requires_grad_()
    value = sorted_probabilities(student, TEACHER, torch.full_like(TARGET, -100))
    value.backward()
    assert value == 0
    assert not student.grad.any()


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(
        lambda s: sorted_probabilities(s, TEACHER, TARGET, temperature=2.0), STUDENT.clone().requires_grad_()
    )
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    sorted_probabilities(student, teacher).backward()
    assert teacher.grad is None


@settings(max_examples=25)
@given(mine=st.permutations(range(10)), theirs=st.permutations(range(7)), shift=st.floats(-20, 20))
def test_which_token_has_which_probability_does_not_matter(mine: list[int], theirs: list[int], shift: float) -> None:
    value = sorted_probabilities(STUDENT[..., mine] + shift, TEACHER[..., theirs] - shift)
    assert value.item() == pytest.approx(sorted_probabilities(STUDENT, TEACHER).item(), rel=1e-9)


def test_zero_where_the_probabilities_are_the_same_in_another_order() -> None:
    assert sorted_probabilities(STUDENT.flip(-1), STUDENT).item() == pytest.approx(0, abs=1e-14)


def test_inputs_stay_as_they_are() -> None:
    student, teacher = STUDENT.clone(), TEACHER.clone()
    sorted_probabilities(student, teacher, TARGET)
    assert torch.equal(student, STUDENT)
    assert torch.equal(teacher, TEACHER)


def test_gradient_stays_of_one_size_when_the_temperature_changes() -> None:
    sizes = []
    for temperature in (64.0, 256.0):
        student = STUDENT.clone().requires_grad_()
        sorted_probabilities(student, wave((2, 4, 10), 1.3, 0.5), temperature=temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@settings(max_examples=25)
@given(st.floats(0.1, 50))
def test_the_temperature_softens_both_sides(temperature: float) -> None:
    softened = temperature * sorted_probabilities(STUDENT / temperature, TEACHER / temperature)
    value = sorted_probabilities(STUDENT, TEACHER, temperature=temperature)
    assert value.item() == pytest.approx(softened.item(), rel=1e-9)


def test_finite_at_extreme_logits() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], requires_grad=True)
    value = sorted_probabilities(student, torch.tensor([[-1e4, 1e4], [-1e4, 1e4]]))
    value.backward()
    assert value.item() == pytest.approx((0 + 1) / 2)  # sure as sure; one half twice beside 1 and 0
    assert student.grad.isfinite().all()


def test_the_module_is_the_function_at_its_present_temperature_for_other_classes() -> None:
    module = ULD(temperature=2.0)
    assert not module.needs_same_classes
    for temperature in (2.0, 1.0):
        module.temperature = temperature
        value = module(Outputs(STUDENT), Outputs(TEACHER), TARGET)
        assert value.item() == pytest.approx(by_loops(STUDENT[COUNTED], TEACHER[COUNTED], temperature), rel=1e-12)
    images = module(Outputs(STUDENT[0]), Outputs(TEACHER[0]), TARGET[0])
    assert images.item() == pytest.approx(by_loops(STUDENT[0], TEACHER[0]), rel=1e-12)  # with label or without


def test_standardised_logits_are_compared_where_asked_for() -> None:
    student, teacher = ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True) for z in (STUDENT[0], TEACHER[0]))
    value = ULD(standardize=True)(Outputs(STUDENT[0]), Outputs(TEACHER[0]), None)
    assert value.item() == pytest.approx(by_loops(student, teacher), rel=1e-6)


def test_other_tokens_a_wrong_target_and_a_wrong_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 10\) and teacher logits \(2, 3, 7\) differ in more than their cla"):
        sorted_probabilities(STUDENT, TEACHER[:, :3])
    with pytest.raises(ValueError, match=r"expected a target \(2, 4\) for logits \(2, 4, 10\), got \(2, 3\)"):
        sorted_probabilities(STUDENT, TEACHER, TARGET[:, :3])
    with pytest.raises(ValueError, match=r"expected temperature > 0, got -1"):
        sorted_probabilities(STUDENT, TEACHER, temperature=-1)
    with pytest.raises(ValueError, match=r"expected temperature > 0, got 0.0"):
        ULD(temperature=0.0)
