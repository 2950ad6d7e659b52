import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import CC, correlation_congruence
from kd_lightning.objective import DistillationObjective
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((6, 16), 0.41, 0.3), wave((6, 16), 0.61, 0.8)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    deviation = [
        [abs(a - b) for a, b in zip(s, t, strict=True)] for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    neighbours = itertools.pairwise(deviation)
    return sum(a * b for one, next_one in neighbours for a, b in zip(one, next_one, strict=True)) / (len(deviation) - 1)


def outputs(feature: Tensor, layer: str) -> Outputs:
    return Outputs(torch.zeros(len(feature), 2, dtype=torch.float64), {layer: feature})


def built(student: Tensor, teacher: Tensor, **options: object) -> CC:
    torch.manual_seed(0)
    loss = CC("a", "b", **options)
    loss.build(outputs(student, "a"), outputs(teacher, "b"))
    return loss.double()


def test_value_of_the_authors() -> None:
    assert correlation_congruence(STUDENT, TEACHER).item() == pytest.approx(60.29727520858967, rel=1e-13)


def test_value_and_gradient_equal_the_formula() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = correlation_congruence(student, TEACHER)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: correlation_congruence(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    correlation_congruence(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = correlation_congruence(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@settings(max_examples=25)
@given(units=st.permutations(range(16)), shift=st.floats(-9, 9), scale=st.floats(0.1, 10))
def test_units_and_a_common_shift_change_nothing_and_scale_counts_squared(units, shift, scale) -> None:
    value = correlation_congruence(STUDENT, TEACHER).item()
    moved = correlation_congruence((scale * STUDENT + shift)[:, units], (scale * TEACHER + shift)[:, units])
    assert moved.item() == pytest.approx(scale**2 * value, rel=1e-9)
    backwards = correlation_congruence(STUDENT.flip(0), TEACHER.flip(0))
    assert backwards.item() == pytest.approx(value, rel=1e-12)


def test_the_order_of_the_samples_counts() -> None:
    order = [0, 2, 4, 1, 3, 5]
    shuffled = correlation_congruence(STUDENT[order], TEACHER[order])
    assert shuffled.item() == pytest.approx(by_loops(STUDENT[order], TEACHER[order]), rel=1e-12)
    assert shuffled.item() != pytest.approx(correlation_congruence(STUDENT, TEACHER).item(), rel=1e-2)


def test_extreme_features_stay_finite() -> None:
    student = (STUDENT.sign() * 1e4).float().requires_grad_()
    loss = correlation_congruence(student, (TEACHER.sign() * -1e4).float())
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_the_module_compares_linear_embeddings_of_both_and_trains_both() -> None:
    student, teacher = wave((6, 5, 2, 3), 0.3, 0.1), wave((6, 9), 0.7, 0.2).requires_grad_()
    loss = built(student, teacher, width=4)
    s, t = loss.student_embedding, loss.teacher_embedding
    assert (s.weight.shape, t.weight.shape) == ((4, 5), (4, 9))
    assert {id(p) for p in loss.parameters()} == {id(p) for p in (s.weight, s.bias, t.weight, t.bias)}
    value = loss(outputs(student, "a"), outputs(teacher, "b"), None)
    expected = by_loops(student.mean((2, 3)) @ s.weight.T + s.bias, teacher @ t.weight.T + t.bias)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    value.backward()
    assert all(p.grad.any() for p in loss.parameters())
    assert teacher.grad is None


def test_embeddings_of_a_bfloat16_training_are_called_in_their_precision() -> None:
    loss = built(STUDENT, TEACHER, width=4).bfloat16()
    single = (Outputs(torch.zeros(6, 2), {name: x.float()}) for name, x in (("a", STUDENT), ("b", TEACHER)))
    value = loss(*single, None)
    value.backward()
    assert value.dtype == torch.float32
    assert loss.teacher_embedding.weight.grad.dtype == torch.bfloat16


def test_the_width_is_the_authors_and_the_objective_makes_the_embeddings() -> None:
    objective = DistillationObjective({"cc": CC("a", "b")})
    objective.build(outputs(STUDENT, "a"), outputs(TEACHER, "b"))
    assert isinstance(objective.losses.cc.student_embedding, nn.Linear)
    assert objective.losses.cc.student_embedding.out_features == 128
    assert objective.losses.cc.compares_samples


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="correlation_congruence compares samples and needs a batch of at least 2"):
        correlation_congruence(STUDENT[:1], TEACHER[:1])
    with pytest.raises(ValueError, match=r"student embeddings \(6, 16\) and teacher embeddings \(6, 15\) differ"):
        correlation_congruence(STUDENT, TEACHER[:, :15])
    with pytest.raises(ValueError, match="expected width >= 1, got 0"):
        CC("a", width=0)
