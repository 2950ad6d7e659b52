import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import DIST, dist, standardize_logits
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((8, 10), 0.7, 0.1), wave((8, 10), 1.3, 0.5)


def distance(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum((x - mean_a) ** 2 for x in a)) * math.sqrt(sum((y - mean_b) ** 2 for y in b))
    return 1 - covariance / (norms + 1e-8)


def by_loops(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    p, q = ([softmax(z, temperature) for z in x.tolist()] for x in (student, teacher))
    rows = [distance(a, b) for a, b in zip(p, q, strict=True)]
    columns = [distance([a[c] for a in p], [b[c] for b in q]) for c in range(len(p[0]))]
    return temperature**2 * (beta * sum(rows) / len(rows) + gamma * sum(columns) / len(columns))


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 1.9271202038300888), (4.0, 31.911688563872165)])
def test_value_of_the_authors(temperature: float, value: float) -> None:
    assert dist(STUDENT, TEACHER, temperature=temperature).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (0.0, 1.0, 2.0), (1.0, 0.0, 2.0)])
def test_value_and_gradient_equal_the_formula(factors: tuple[float, float, float]) -> None:
    beta, gamma, temperature = factors
    student = STUDENT[:3, :7].clone().requires_grad_()
    loss = dist(student, TEACHER[:3, :7], beta=beta, gamma=gamma, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT[:3, :7], TEACHER[:3, :7], *factors), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER[:3, :7], *factors), STUDENT[:3, :7])
    # Central differences are right to some 1e-9.
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-7)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: dist(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    dist(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_up_to_the_epsilon_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = dist(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, STUDENT, 1.0, 1.0, 1.0), rel=1e-6)
    assert 0 < loss.item() < 1e-4
    assert student.grad.abs().max() < 1e-4


@settings(max_examples=25)
@given(slope=st.floats(0.2, 1.0))
def test_only_the_relations_of_the_classes_count(slope: float) -> None:
    # Probabilities that are the teacher's, drawn towards 1/C: every row and every column correlates perfectly.
    q = torch.softmax(TEACHER, -1)
    drawn = (slope * q + (1 - slope) / 10).log()
    assert dist(drawn, TEACHER).item() == pytest.approx(0, abs=1e-3)
    assert dist((0.1 * q.flip(-1) + 0.09).log(), TEACHER).item() > 0.5


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
    other = dist((STUDENT + moved)[samples][:, classes], (TEACHER - moved)[samples][:, classes])
    assert other.item() == pytest.approx(dist(STUDENT, TEACHER).item(), rel=1e-9)


def test_a_samples_loss_depends_on_its_batch() -> None:
    halves = (dist(STUDENT[:4], TEACHER[:4]) + dist(STUDENT[4:], TEACHER[4:])) / 2
    assert abs(halves - dist(STUDENT, TEACHER)) > 1e-3
    assert DIST.compares_samples
    assert DIST(gather=True).gather


def test_extreme_logits_give_the_limit_and_not_nan() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]])
    loss = dist(student, teacher)
    loss.backward()
    # Rows: (1, 0, 0) against (0, 1, 0) have the correlation -1/2, the second are equal. Columns: all are constant on
    # one side, (1, 0) against (0, 0), (0, 1) against (1, 1), (0, 0) against (0, 0).
    assert loss.item() == pytest.approx(1.5 / 2 + 1, rel=1e-6)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_constant_logits_correlate_with_nothing(constant: float) -> None:
    student, teacher = torch.full((4, 7), constant, requires_grad=True), wave((4, 7), 1.3, 0.5).float()
    loss = dist(student, teacher, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(2.0**2 * 2, rel=1e-5)
    assert student.grad.isfinite().all()
    step = -student.grad / student.grad.norm()  # towards the teacher's relations, however long the gradient is
    assert dist(step, teacher, temperature=2.0) < 1
    assert dist(student, torch.zeros(4, 7)).item() == pytest.approx(2)


def test_identical_samples_leave_the_inter_class_term() -> None:
    student = STUDENT[:1].repeat(4, 1).requires_grad_()
    loss = dist(student, TEACHER[:1].repeat(4, 1))
    loss.backward()
    assert loss.item() == pytest.approx(dist(STUDENT[:1], TEACHER[:1], gamma=0.0).item() + 1, rel=1e-9)
    assert student.grad.isfinite().all()


def test_one_sample_is_refused_unless_the_samples_are_not_compared() -> None:
    with pytest.raises(ValueError, match="dist compares samples and needs a batch of at least 2, got 1"):
        dist(STUDENT[:1], TEACHER[:1])
    assert DIST.min_batch_size == 2
    rows = [dist(STUDENT[i : i + 1], TEACHER[i : i + 1], gamma=0.0).item() for i in range(8)]
    assert dist(STUDENT, TEACHER, gamma=0.0).item() == pytest.approx(sum(rows) / 8, rel=1e-12)


def test_unlabelled_samples_count_and_ignored_tokens_do_not() -> None:
    whole = DIST()(Outputs(STUDENT), Outputs(TEACHER), None)
    assert DIST()(Outputs(STUDENT), Outputs(TEACHER), torch.full((8,), -100)) == whole
    tokens, student = torch.tensor([[0, -100, 2, 3], [-100, -100, 6, 7]]), STUDENT.clone().requires_grad_()
    kept = tokens.flatten() != -100
    loss = DIST()(Outputs(student.view(2, 4, 10)), Outputs(TEACHER.view(2, 4, 10)), tokens)
    loss.backward()
    torch.testing.assert_close(loss, dist(STUDENT[kept], TEACHER[kept]))
    assert not student.grad[~kept].any()


def test_a_batch_of_padding_gives_zero_with_a_gradient_of_zero() -> None:
    student = STUDENT.reshape(2, 4, 10).requires_grad_()
    loss = DIST()(Outputs(student), Outputs(TEACHER.view(2, 4, 10)), torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_pixels_count_as_samples() -> None:
    pixels = [x.reshape(2, 2, 2, 10).movedim(-1, 1) for x in (STUDENT, TEACHER)]
    torch.testing.assert_close(dist(*pixels), dist(STUDENT, TEACHER))


def test_the_module_is_the_function_at_its_present_settings() -> None:
    loss = DIST(beta=0.5, gamma=2.0, temperature=3.0)
    value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, 0.5, 2.0, 3.0), rel=1e-12)
    loss.beta, loss.gamma, loss.temperature = 2.0, 1.0, 1.5
    value = loss(Outputs(STUDENT), Outputs(TEACHER), None)
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER, 2.0, 1.0, 1.5), rel=1e-12)


def test_standardised_logits_are_compared_where_asked_for() -> None:
    value = DIST(standardize=True)(Outputs(STUDENT), Outputs(TEACHER), None)
    torch.testing.assert_close(value, dist(standardize_logits(STUDENT), standardize_logits(TEACHER)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "expected beta >= 0, got -1.0"),
        ({"gamma": math.nan}, "expected gamma >= 0, got nan"),
        ({"temperature": 0.0}, "expected temperature > 0, got 0.0"),
        ({"weight": -1.0}, "expected weight >= 0, got -1.0"),
    ],
)
def test_coefficients_that_turn_a_term_round_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIST(**options)


def test_inputs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student logits \(8, 10\) and teacher logits \(8, 9\) differ"):
        dist(STUDENT, TEACHER[:, :9])
    with pytest.raises(ValueError, match="expected temperature > 0, got -1"):
        dist(STUDENT, TEACHER, temperature=-1)


def test_a_learnt_temperature_gets_its_gradient() -> None:
    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dist(STUDENT, TEACHER, temperature=t), temperature)
