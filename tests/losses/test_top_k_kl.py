import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import TopKKL, forward_kl, missing_mass, top_k_kl
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((2, 4, 10), 0.7, 0.1), wave((2, 4, 10), 1.3, 0.5)
LOG_PROBS = TEACHER.log_softmax(-1)
TARGET = torch.tensor([[1, -100, 0, 3], [-100, -100, 7, 2]])
COUNTED = TARGET != -100


def best(k: int, log_probs: Tensor = LOG_PROBS) -> tuple[Tensor, Tensor]:
    found = log_probs.topk(k, -1)
    return found.indices, found.values


def by_loops(student: Tensor, teacher: Tensor, k: int, tail: bool, temperature: float) -> float:
    def outcomes(probabilities: list[float], kept: list[int]) -> list[float]:
        buckets = [probabilities[i] for i in kept]
        if tail and k < len(probabilities):
            buckets.append(sum(p for i, p in enumerate(probabilities) if i not in kept))
        powers = [p ** (1 / temperature) for p in buckets]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        kept = sorted(range(len(t)), key=lambda i: -t[i])[:k]
        q_s, q_t = outcomes(softmax(s), kept), outcomes(softmax(t), kept)
        total += sum(q * math.log(q / p) for p, q in zip(q_s, q_t, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_value_and_gradient_equal_the_formula(k: int, tail: bool, temperature: float) -> None:
    student = STUDENT[0].clone().requires_grad_()
    value = top_k_kl(student, *best(k, LOG_PROBS[0]), tail=tail, temperature=temperature)
    value.backward()
    expected = by_loops(STUDENT[0], TEACHER[0], k, tail, temperature)
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-14)
    gradient = numerical_gradient(lambda s: by_loops(s, TEACHER[0], k, tail, temperature), STUDENT[0])
    torch.testing.assert_close(student.grad, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_all_classes_are_the_forward_kl(tail: bool, temperature: float) -> None:
    mine, other = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    value = top_k_kl(mine, *best(10), TARGET, tail=tail, temperature=temperature)
    expected = forward_kl(other, TEACHER, TARGET, temperature=temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, other.grad)


def test_with_a_tail_it_grows_with_k_up_to_the_forward_kl() -> None:
    values = [top_k_kl(STUDENT, *best(k)).item() for k in range(1, 10)]
    assert values[0] > 0
    assert values == sorted(values)  # telling outcomes apart can only add to a divergence
    assert values[-1] == pytest.approx(forward_kl(STUDENT, TEACHER).item(), rel=1e-12)  # the tail is one class


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_is_right(tail: bool, temperature: float) -> None:
    teacher = best(3)
    assert torch.autograd.gradcheck(
        lambda s: top_k_kl(s, *teacher, TARGET, tail=tail, temperature=temperature), STUDENT.clone().requires_grad_()
    )


def test_teacher_gets_no_gradient() -> None:
    student, log_probs = STUDENT.clone().requires_grad_(), best(3)[1].clone().requires_grad_()
    top_k_kl(student, best(3)[0], log_probs).backward()
    assert student.grad.any()
    assert log_probs.grad is None


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(tail: bool, temperature: float) -> None:
    student = TEACHER.clone().requires_grad_()
    value = top_k_kl(student, *best(3), tail=tail, temperature=temperature)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-13)
    torch.testing.assert_close(student.grad, torch.zeros_like(TEACHER))


def test_without_a_tail_other_classes_are_free() -> None:
    indices, log_probs = best(3)
    student = STUDENT.clone().requires_grad_()
    top_k_kl(student, indices, log_probs, tail=False).backward()
    chosen = torch.zeros_like(STUDENT, dtype=torch.bool).scatter(-1, indices, True)
    assert student.grad[~chosen].abs().max() < 1e-15
    with_tail = STUDENT.clone().requires_grad_()
    top_k_kl(with_tail, indices, log_probs).backward()
    assert with_tail.grad[~chosen].abs().min() > 1e-6


@pytest.mark.parametrize("tail", [True, False])
def test_ignored_tokens_do_not_count(tail: bool) -> None:
    student = STUDENT.clone().requires_grad_()
    indices, log_probs = best(3)
    value = top_k_kl(student, indices, log_probs, TARGET, tail=tail)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT[COUNTED], TEACHER[COUNTED], 3, tail, 1.0), rel=1e-12)
    assert not student.grad[~COUNTED].any()
    other = top_k_kl(STUDENT, indices, log_probs, torch.where(COUNTED, TARGET, -1), tail=tail, ignore_index=-1)
    assert other == value


def test_zero_with_a_gradient_of_zero_where_no_token_counts() -> None:
    student = STUDENT.clone().requires_grad_()
    value = top_k_kl(student, *best(3), torch.full_like(TARGET, -100))
    value.backward()
    assert value == 0
    assert not student.grad.any()


def test_pixels_count_as_samples() -> None:
    student, teacher = wave((2, 5, 3, 4), 0.7, 0.1), wave((2, 5, 3, 4), 1.3, 0.5)
    pixels = [z.permute(0, 2, 3, 1).reshape(-1, 5) for z in (student, teacher)]
    value = TopKKL(k=2)(Outputs(student), Outputs(teacher), torch.full((2, 3, 4), -100))
    assert value.item() == pytest.approx(by_loops(*pixels, 2, True, 1.0), rel=1e-12)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_finite_at_extreme_logits(tail: bool, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4], [1e4, 1e4, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [-1e4, -1e4, 1e4]])
    value = top_k_kl(student, *best(2, teacher.log_softmax(-1)), tail=tail, temperature=temperature)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert not student.grad[1].any()


def test_a_padded_vocabulary_and_missing_ranks_add_nothing() -> None:
    indices, log_probs = best(3)
    student = torch.cat((STUDENT, torch.full((2, 4, 2), -torch.inf, dtype=torch.float64)), -1).requires_grad_()
    ranks = (
        torch.cat((indices, torch.full((2, 4, 1), 10)), -1),
        torch.nn.functional.pad(log_probs, (0, 1), value=-torch.inf),
    )
    value = top_k_kl(student, *ranks)
    value.backward()
    assert value.item() == pytest.approx(top_k_kl(STUDENT, indices, log_probs).item(), rel=1e-12)
    assert student.grad.isfinite().all()


def test_a_tail_smaller_than_rounding_keeps_its_digits() -> None:
    # log p of the student's other class is -50 beside 1 - exp(-50), which is 1 in any precision.
    student = torch.tensor([[50.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.75]]).log()
    value = top_k_kl(student, torch.tensor([[0]]), teacher)
    value.backward()
    assert value.item() == pytest.approx(0.75 * math.log(0.75) + 0.25 * (math.log(0.25) + 50), rel=1e-6)
    assert student.grad[0].tolist() == pytest.approx([0.25, -0.25], rel=1e-6)


def test_a_small_missing_mass_keeps_its_digits() -> None:
    log_probs = torch.log1p(torch.tensor([[-3e-6]], dtype=torch.float64)).float()
    assert missing_mass(log_probs).item() == pytest.approx(3e-6, rel=1e-6)
    value = top_k_kl(torch.tensor([[30.0, 0.0]]), torch.tensor([[0]]), log_probs)
    assert value.item() == pytest.approx(3e-6 * (math.log(3e-6) + 30) - 3e-6, rel=5e-3)


@settings(max_examples=25)
@given(
    ranks=st.permutations(range(4)),
    classes=st.permutations(range(10)),
    tail=st.booleans(),
    shift=st.floats(-20, 20),
)
def test_the_order_of_ranks_and_classes_and_a_shift_change_nothing(ranks, classes, tail: bool, shift: float) -> None:
    expected = top_k_kl(STUDENT, *best(4), tail=tail).item()
    indices, log_probs = best(4, LOG_PROBS[..., classes])
    value = top_k_kl(STUDENT[..., classes] + shift, indices[..., ranks], log_probs[..., ranks], tail=tail)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_missing_mass_is_what_the_other_classes_have() -> None:
    probabilities = TEACHER.softmax(-1).sort(-1, descending=True).values
    for k in (1, 3, 9):
        torch.testing.assert_close(missing_mass(best(k)[1]), probabilities[..., k:].sum(-1))
    torch.testing.assert_close(missing_mass(LOG_PROBS), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-15)


def test_missing_mass_is_no_less_than_zero_where_rounding_would_have_it_so() -> None:
    assert missing_mass(torch.tensor([0.6, 0.4 + 1e-6]).log()) == 0
    value = top_k_kl(torch.zeros(1, 3), torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4 + 1e-6]]).log())
    assert value.item() == pytest.approx(0.6 * math.log(1.8) + 0.4 * math.log(1.2), rel=1e-5)


@pytest.mark.parametrize("tail", [True, False])
def test_the_module_takes_the_teachers_best_at_its_present_settings(tail: bool) -> None:
    module = TopKKL(k=3, tail=tail, temperature=2.0)
    for temperature in (2.0, 1.0):
        module.temperature = temperature
        value = module(Outputs(STUDENT), Outputs(TEACHER), TARGET)
        expected = by_loops(STUDENT[COUNTED], TEACHER[COUNTED], 3, tail, temperature)
        assert value.item() == pytest.approx(expected, rel=1e-12)
    everything = module(Outputs(STUDENT), Outputs(TEACHER), None)
    assert everything.item() == pytest.approx(by_loops(STUDENT.flatten(0, 1), TEACHER.flatten(0, 1), 3, tail, 1.0))


def test_an_image_without_label_counts() -> None:
    value = TopKKL(k=3)(Outputs(STUDENT[0]), Outputs(TEACHER[0]), TARGET[0])
    assert value.item() == pytest.approx(by_loops(STUDENT[0], TEACHER[0], 3, True, 1.0), rel=1e-12)


def test_standardised_logits_are_compared_where_asked_for() -> None:
    student, teacher = ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True) for z in (STUDENT[0], TEACHER[0]))
    value = TopKKL(k=3, standardize=True)(Outputs(STUDENT[0]), Outputs(TEACHER[0]), None)
    assert value.item() == pytest.approx(by_loops(student, teacher, 3, True, 1.0), rel=1e-6)


@pytest.mark.parametrize(
    ("indices", "log_probs"),
    [((2, 4, 3), (2, 4, 2)), ((2, 3, 3), (2, 3, 3)), ((2, 4, 11), (2, 4, 11)), ((2, 4, 0), (2, 4, 0))],
)
def test_shapes_that_do_not_belong_together_are_refused(indices, log_probs) -> None:
    message = r"expected indices and log_probs \(2, 4, k\) with k from 1 to 10 for student logits \(2, 4, 10\), got"
    with pytest.raises(ValueError, match=message):
        top_k_kl(STUDENT, torch.zeros(indices, dtype=torch.long), torch.zeros(log_probs))


def test_a_wrong_target_k_temperature_or_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a target \(2, 4\) for logits \(2, 4, 10\), got \(4,\)"):
        top_k_kl(STUDENT, *best(3), TARGET[0])
    with pytest.raises(ValueError, match="expected k >= 1, got 0"):
        TopKKL(k=0)
    with pytest.raises(ValueError, match="expected k up to the 10 classes, got 11: take forward_kl"):
        TopKKL(k=11)(Outputs(STUDENT), Outputs(TEACHER), None)
    for teacher in (TEACHER[..., :9], torch.cat((TEACHER, TEACHER), -1)):  # where the best may be among the first ten
        with pytest.raises(ValueError, match=r"student logits \(2, 4, 10\) and teacher logits \(2, 4, (9|20)\) differ"):
            TopKKL(k=3)(Outputs(STUDENT), Outputs(teacher), None)
    for make in (lambda: TopKKL(k=3, temperature=0.0), lambda: top_k_kl(STUDENT, *best(3), temperature=0.0)):
        with pytest.raises(ValueError, match=r"expected temperature > 0, got 0.0"):
            make()
