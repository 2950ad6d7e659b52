import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import PKT, pkt
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((5, 7), 0.41, 0.3), wave((5, 4), 0.61, 0.8)


def by_loops(student: Tensor, teacher: Tensor, epsilon: float = 1e-7) -> float:
    def rows(x: Tensor) -> list[list[float]]:
        points = [[v / (math.hypot(*row) + epsilon) for v in row] for row in x.tolist()]
        similar = [[(1 + sum(a * b for a, b in zip(p, q, strict=True))) / 2 for q in points] for p in points]
        return [[v / sum(row) for v in row] for row in similar]

    terms = [
        t * math.log((t + epsilon) / (s + epsilon))
        for row_s, row_t in zip(rows(student), rows(teacher), strict=True)
        for s, t in zip(row_s, row_t, strict=True)
    ]
    return sum(terms) / len(terms)


def test_value_of_the_authors() -> None:
    value = pkt(wave((6, 16), 0.41, 0.3), wave((6, 16), 0.61, 0.8))
    assert value.item() == pytest.approx(0.06320628255974685, rel=1e-12)


def test_value_and_gradient_equal_the_formula_for_different_widths() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = pkt(student, TEACHER)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: pkt(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    pkt(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = pkt(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == 0
    # ε in the logarithm moves the minimum by some 1e-7.
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT), rtol=0, atol=1e-7)


@settings(max_examples=25)
@given(scales=st.lists(st.floats(0.1, 10), min_size=5, max_size=5), order=st.permutations(range(5)))
def test_the_samples_lengths_and_order_change_nothing(scales: list[float], order: list[int]) -> None:
    stretched = STUDENT * torch.tensor(scales, dtype=torch.float64)[:, None]
    assert pkt(stretched[order], TEACHER[order]).item() == pytest.approx(pkt(STUDENT, TEACHER).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["zero", "one zero", "identical", "opposite", "extreme"])
def test_edges_stay_finite(name: str) -> None:
    features = {
        "zero": torch.zeros(5, 7),
        "one zero": STUDENT.float() * torch.tensor([0.0, 1, 1, 1, 1])[:, None],
        "identical": torch.ones(5, 7),
        "opposite": torch.ones(5, 1000) / 3 * torch.tensor([1.0, -1, 1, -1, 1])[:, None],
        "extreme": (STUDENT.sign() * 1e4).float(),
    }
    student = features[name].clone().requires_grad_()
    loss = pkt(student, TEACHER.float())
    loss.backward()
    assert loss.isfinite()
    assert student.grad.abs().max() < 10
    assert pkt(TEACHER.float(), features[name]).isfinite()


def test_a_vector_of_zeros_is_half_similar_to_all_and_is_not_moved() -> None:
    student = STUDENT * torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)[:, None]
    student.requires_grad_()
    loss = pkt(student, TEACHER)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(student.detach(), TEACHER), rel=1e-12)
    assert not student.grad[0].any()
    assert student.grad[1:].any()


def test_the_module_is_the_function_on_embeddings() -> None:
    maps = wave((5, 7, 2, 3), 0.3, 0.1)
    loss = PKT("a", "b")
    assert loss.compares_samples
    value = loss(Outputs(torch.zeros(5, 2), {"a": maps}), Outputs(torch.zeros(5, 2), {"b": TEACHER}), None)
    assert value.item() == pytest.approx(by_loops(maps.mean((2, 3)), TEACHER), rel=1e-12)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="pkt compares samples and needs a batch of at least 2, got 1"):
        pkt(STUDENT[:1], TEACHER[:1])
    assert PKT("a").min_batch_size == 2
