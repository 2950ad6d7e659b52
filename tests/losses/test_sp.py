import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import SP, similarity_preserving
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, WIDE = wave((4, 2, 3, 2), 0.37, 0.2), wave((4, 5), 0.53, 0.9)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    def rows(x: Tensor) -> list[list[float]]:
        points = x.flatten(1).tolist()
        products = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in points] for p in points]
        return [[v / (math.hypot(*row) or 1) for v in row] for row in products]

    s, t = rows(student), rows(teacher)
    return sum((s[i][j] - t[i][j]) ** 2 for i in range(len(s)) for j in range(len(s))) / len(s) ** 2


def test_value_of_the_authors() -> None:
    assert similarity_preserving(STUDENT, TEACHER).item() == pytest.approx(0.0005236491035256084, rel=1e-12)


def test_value_and_gradient_equal_the_formula_for_different_shapes() -> None:
    student = SMALL.clone().requires_grad_()
    loss = similarity_preserving(student, WIDE)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(SMALL, WIDE), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, WIDE), SMALL)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: similarity_preserving(s, WIDE), SMALL.clone().requires_grad_())
    teacher = WIDE.clone().requires_grad_()
    similarity_preserving(SMALL.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = similarity_preserving(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@settings(max_examples=25)
@given(scale=st.floats(0.1, 10), samples=st.permutations(range(4)), units=st.permutations(range(12)))
def test_scale_and_order_change_nothing(scale: float, samples: list[int], units: list[int]) -> None:
    moved = similarity_preserving(scale * SMALL.flatten(1)[samples][:, units], WIDE[samples])
    assert moved.item() == pytest.approx(similarity_preserving(SMALL, WIDE).item(), rel=1e-9)


@pytest.mark.parametrize("name", ["zero", "one zero", "identical", "extreme"])
def test_edges_stay_finite(name: str) -> None:
    features = {
        "zero": torch.zeros(4, 6),
        "one zero": SMALL.float().flatten(1) * torch.tensor([0.0, 1, 1, 1])[:, None],
        "identical": torch.ones(4, 6),
        "extreme": (STUDENT.sign() * 1e4).float(),
    }
    student = features[name].clone().requires_grad_()
    loss = similarity_preserving(student, WIDE.float())
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(features[name], WIDE), rel=1e-4)
    assert student.grad.abs().max() < 10
    assert similarity_preserving(WIDE.float(), features[name]).isfinite()


def test_a_sample_of_zeros_does_not_blow_up_the_gradient_of_the_others() -> None:
    mask = torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)[:, None]
    student = (SMALL.flatten(1) * mask).requires_grad_()
    similarity_preserving(student, WIDE).backward()
    others = numerical_gradient(lambda s: by_loops(s * mask, WIDE), student.detach())
    torch.testing.assert_close(student.grad[1:], others[1:], rtol=1e-6, atol=1e-9)


def test_the_module_is_the_function_on_whole_maps() -> None:
    loss = SP("a", "b")
    assert loss.compares_samples
    value = loss(Outputs(torch.zeros(4, 2), {"a": SMALL}), Outputs(torch.zeros(4, 2), {"b": WIDE}), None)
    assert value.item() == pytest.approx(by_loops(SMALL, WIDE), rel=1e-12)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="similarity_preserving compares samples and needs a batch of at least 2"):
        similarity_preserving(SMALL[:1], WIDE[:1])
    assert SP("a").min_batch_size == 2
