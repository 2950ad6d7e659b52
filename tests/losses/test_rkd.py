import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import RKD, rkd_angle, rkd_distance
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((5, 7), 0.3, 0.1), wave((5, 4), 0.7, 0.2)
LOSSES = pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def distance_by_loops(student: Tensor, teacher: Tensor) -> float:
    def relative(x: Tensor) -> dict[tuple[int, int], float]:
        d = {(i, j): math.dist(x[i].tolist(), x[j].tolist()) for i, j in itertools.product(range(len(x)), repeat=2)}
        positive = [v for v in d.values() if v > 0]
        return {k: v / (sum(positive) / len(positive)) for k, v in d.items()}

    s, t = relative(student), relative(teacher)
    return sum(huber(s[k] - t[k]) for k in s) / len(s)


def angle_by_loops(student: Tensor, teacher: Tensor) -> float:
    def cosines(x: Tensor) -> list[float]:
        points, found = x.tolist(), []
        for i, j, k in itertools.product(range(len(points)), repeat=3):
            one = [a - b for a, b in zip(points[j], points[i], strict=True)]
            other = [a - b for a, b in zip(points[k], points[i], strict=True)]
            sizes = math.hypot(*one) * math.hypot(*other)
            found.append(sum(a * b for a, b in zip(one, other, strict=True)) / sizes if sizes else 0.0)
        return found

    s, t = cosines(student), cosines(teacher)
    return sum(huber(a - b) for a, b in zip(s, t, strict=True)) / len(s)


@pytest.mark.parametrize(("loss", "by_loops"), [(rkd_distance, distance_by_loops), (rkd_angle, angle_by_loops)])
def test_value_and_gradient_equal_the_formula_for_different_widths(loss, by_loops) -> None:
    student = STUDENT.clone().requires_grad_()
    value = loss(student, TEACHER)
    value.backward()
    assert value.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, TEACHER), STUDENT)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("loss", "value"), [(rkd_distance, 0.21462429062438526), (rkd_angle, 0.2890413642966174)])
def test_value_of_the_authors(loss, value: float) -> None:
    assert loss(wave((6, 16), 0.41, 0.3), wave((6, 16), 0.61, 0.8)).item() == pytest.approx(value, rel=1e-12)


@LOSSES
def test_gradient_is_right_and_none_is_the_teachers(loss) -> None:
    assert torch.autograd.gradcheck(lambda s: loss(s, TEACHER), STUDENT.clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    loss(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


@LOSSES
def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher(loss) -> None:
    student = STUDENT.clone().requires_grad_()
    value = loss(student, STUDENT.clone())
    value.backward()
    assert value.item() == 0
    assert not student.grad.any()


@LOSSES
def test_samples_that_coincide_do_not_move_each_other(loss) -> None:
    student = STUDENT.clone()
    student[1] = student[0]
    student.requires_grad_()
    value = loss(student, TEACHER)
    value.backward()
    by_loops = distance_by_loops if loss is rkd_distance else angle_by_loops
    assert value.item() == pytest.approx(by_loops(student.detach(), TEACHER), rel=1e-12)
    assert student.grad.abs().max() < 1
    assert student.grad.any()


@LOSSES
@pytest.mark.parametrize("twins", [torch.zeros(5, 3), torch.full((5, 3), 1e4)])
def test_a_collapsed_batch_has_a_finite_loss_and_no_gradient(loss, twins: Tensor) -> None:
    student = twins.clone().requires_grad_()
    value = loss(student, TEACHER.float())
    value.backward()
    assert value.isfinite()
    assert not student.grad.any()
    assert loss(TEACHER.float(), twins).isfinite()


@LOSSES
def test_a_batch_that_is_close_together_keeps_its_relations_in_single_precision(loss) -> None:
    """|x|² + |y|² − 2xy would be nothing but rounding here."""
    student = (100 + 1e-2 * STUDENT).float().requires_grad_()
    exact = student.detach().double().requires_grad_()
    value, double = loss(student, TEACHER.float()), loss(exact, TEACHER)
    value.backward()
    double.backward()
    assert value.item() == pytest.approx(double.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * exact.grad.abs().max().item())


@LOSSES
def test_two_samples_that_are_close_among_others_keep_their_gradient(loss) -> None:
    student = STUDENT.clone()
    student[1] = student[0] + 1e-4 * wave((7,), 0.9, 0.4)
    student = student.float().requires_grad_()
    exact = student.detach().double().requires_grad_()
    value, double = loss(student, TEACHER.float()), loss(exact, TEACHER)
    value.backward()
    double.backward()
    assert value.item() == pytest.approx(double.item(), rel=1e-4)
    assert (student.grad - exact.grad).abs().max() < 1e-3 * exact.grad.abs().max()


@LOSSES
def test_memory_does_not_grow_with_pairs_times_width(loss) -> None:
    kept = []
    student, teacher = wave((20, 3000), 0.3, 0.1).requires_grad_(), wave((20, 3000), 0.7, 0.2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss(student, teacher)
    assert max(kept) <= 20 * 3000


@LOSSES
def test_extreme_features_stay_finite(loss) -> None:
    student = (STUDENT.sign() * 1e4).float().requires_grad_()
    value = loss(student, (TEACHER * 1e4).float())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@settings(max_examples=25)
@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5), order=st.permutations(range(5)), turn=st.floats(0, 6))
def test_relations_do_not_see_scale_shift_rotation_or_order(scale, shift, order, turn) -> None:
    rotation = torch.eye(7, dtype=torch.float64)
    rotation[:2, :2] = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    for loss in (rkd_distance, rkd_angle):
        moved = loss((scale * STUDENT @ rotation + shift)[order], TEACHER[order])
        assert moved.item() == pytest.approx(loss(STUDENT, TEACHER).item(), rel=1e-6)


def test_the_module_weighs_both_on_embeddings() -> None:
    loss = RKD("a", "b")
    assert (loss.distance_weight, loss.angle_weight, loss.weight) == (25, 50, 1)
    assert loss.compares_samples
    student = wave((5, 7, 2, 3), 0.3, 0.1)
    pooled = student.mean((2, 3))
    outputs = Outputs(torch.zeros(5, 2), {"a": student}), Outputs(torch.zeros(5, 2), {"b": TEACHER})
    for weights in ((25.0, 50.0), (1.0, 0.0), (0.0, 2.0)):
        loss.distance_weight, loss.angle_weight = weights
        expected = weights[0] * distance_by_loops(pooled, TEACHER) + weights[1] * angle_by_loops(pooled, TEACHER)
        assert loss(*outputs, None).item() == pytest.approx(expected, rel=1e-12)


def test_value_of_the_authors_for_both() -> None:
    outputs = (Outputs(torch.zeros(6, 2), {"a": wave((6, 16), *x)}) for x in ((0.41, 0.3), (0.61, 0.8)))
    assert RKD("a")(*outputs, None).item() == pytest.approx(19.817675480440503, rel=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rkd_distance compares samples and needs a batch of at least 2, got 1"):
        rkd_distance(STUDENT[:1], TEACHER[:1])
    with pytest.raises(ValueError, match=r"rkd_angle compares samples and needs a batch of at least 3, got 2"):
        rkd_angle(STUDENT[:2], TEACHER[:2])
    with pytest.raises(ValueError, match="expected angle_weight >= 0, got -1"):
        RKD("a", angle_weight=-1)
    with pytest.raises(ValueError, match="expected distance_weight >= 0, got -1"):
        RKD("a", distance_weight=-1)
