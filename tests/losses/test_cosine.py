import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import Cosine, cosine
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((5, 4), 0.41, 0.3), wave((5, 4), 0.61, 0.8)
WIDER = wave((5, 7), 0.61, 0.8)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total += 1 - sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))
    return total / len(student)


def built(teacher: Tensor, **options: object) -> Cosine:
    torch.manual_seed(0)
    loss = Cosine(**options).double()
    loss.build(Outputs(STUDENT), Outputs(teacher))
    return loss.double()


def test_value_and_gradient_equal_the_formula() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = cosine(student, TEACHER)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


def test_value_is_that_of_torchs_own_loss() -> None:
    expected = torch.nn.CosineEmbeddingLoss()(STUDENT, TEACHER, torch.ones(5))
    assert cosine(STUDENT, TEACHER).item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: cosine(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    cosine(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


@given(scales=st.lists(st.floats(0.1, 10), min_size=5, max_size=5), order=st.permutations(range(5)))
def test_the_vectors_lengths_and_order_change_nothing(scales: list[float], order: list[int]) -> None:
    stretched = STUDENT * torch.tensor(scales, dtype=torch.float64)[:, None]
    assert cosine(stretched[order], TEACHER[order]).item() == pytest.approx(cosine(STUDENT, TEACHER).item(), rel=1e-12)


def test_from_zero_where_both_point_the_same_way_to_two_where_they_are_opposed() -> None:
    student = STUDENT.clone().requires_grad_()
    same = cosine(student, 3 * STUDENT)
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-15)
    assert student.grad.abs().max() < 1e-15
    assert cosine(STUDENT, -STUDENT).item() == pytest.approx(2)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4])
def test_edges_stay_finite(size: float) -> None:
    student = (size * STUDENT).float().requires_grad_()
    loss = cosine(student, TEACHER.float())
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    if not size:
        assert loss == 1
        assert not student.grad.any()


def test_the_projector_leads_to_the_teachers_width_and_is_learnt() -> None:
    loss = built(WIDER)
    assert loss.projector.weight.shape == (7, 4)
    value = loss(Outputs(STUDENT), Outputs(WIDER), None)
    projected = STUDENT @ loss.projector.weight.T + loss.projector.bias
    assert value.item() == pytest.approx(by_loops(projected, WIDER), rel=1e-12)
    value.backward()
    assert loss.projector.weight.grad.any()


def test_without_a_projector_the_vectors_themselves_are_compared() -> None:
    loss = built(TEACHER, projected=False)
    assert not list(loss.parameters())
    assert loss(Outputs(STUDENT), Outputs(TEACHER), None).item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    with pytest.raises(ValueError, match=r"student vectors \(5, 4\) and teacher vectors \(5, 7\) differ"):
        loss(Outputs(STUDENT), Outputs(WIDER), None)


def test_layers_are_compared_where_they_are_named() -> None:
    loss = Cosine("pooled", "hidden", projected=False)
    student, teacher = Outputs(WIDER, {"pooled": STUDENT}), Outputs(WIDER, {"hidden": TEACHER})
    assert loss(student, teacher, None).item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    with pytest.raises(ValueError, match="expected a student_layer to compare with 'hidden'"):
        Cosine(teacher_layer="hidden")
