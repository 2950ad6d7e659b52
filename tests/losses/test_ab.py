import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import AB, activation_boundary
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, SMALL_TEACHER = STUDENT[:2, :3, :1, :4] / 2, TEACHER[:2, :3, :1, :4]


def outputs(*features: Tensor) -> Outputs:
    layers = {f"layer{i}": feature for i, feature in enumerate(features)}
    return Outputs(torch.zeros(len(features[0]), 2, dtype=features[0].dtype), layers)


def built(students: list[Tensor], teachers: list[Tensor], **options: object) -> AB:
    torch.manual_seed(0)
    loss = AB([f"layer{i}" for i in range(len(students))], **options)
    loss.build(outputs(*students), outputs(*teachers))
    return loss.double()


def ab_by_loops(student: Tensor, teacher: Tensor, margin: float) -> float:
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if t > 0 and s < margin:
            total += (s - margin) ** 2
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
    return total / len(student)


def normalised(x: Tensor) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt()


def test_value_of_the_authors() -> None:
    value = activation_boundary(STUDENT, TEACHER, margin=1.0).item() * AB(["layer"]).weight
    assert value == pytest.approx(5.445176999383306, rel=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0, 2.0])
def test_value_and_gradient_equal_the_formula(margin: float) -> None:
    student = SMALL.clone().requires_grad_()
    loss = activation_boundary(student, SMALL_TEACHER, margin=margin)
    loss.backward()
    assert loss.item() == pytest.approx(ab_by_loops(SMALL, SMALL_TEACHER, margin), rel=1e-12)
    expected = numerical_gradient(lambda s: ab_by_loops(s, SMALL_TEACHER, margin), SMALL)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: activation_boundary(s, SMALL_TEACHER), SMALL.clone().requires_grad_())
    teacher = SMALL_TEACHER.clone().requires_grad_()
    activation_boundary(SMALL.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_where_every_neuron_is_on_the_teachers_side_by_the_margin() -> None:
    student = (TEACHER.sign() * 1.25).requires_grad_()
    loss = activation_boundary(student, TEACHER, margin=1.25)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def test_a_teachers_neuron_at_zero_is_inactive() -> None:
    student = torch.tensor([[0.5]], dtype=torch.float64)
    assert activation_boundary(student, torch.zeros_like(student)).item() == 1.5**2


@settings(max_examples=25)
@given(samples=st.permutations(range(4)), channels=st.permutations(range(6)), scale=st.floats(0.01, 100))
def test_order_and_the_size_of_the_teachers_responses_change_nothing(samples, channels, scale: float) -> None:
    shuffled = activation_boundary(STUDENT[samples][:, channels], scale * TEACHER[samples][:, channels])
    assert shuffled.item() == pytest.approx(activation_boundary(STUDENT, TEACHER).item(), rel=1e-12)


@settings(max_examples=25)
@given(scale=st.floats(0.01, 100))
def test_scaling_student_and_margin_scales_by_the_square(scale: float) -> None:
    value = activation_boundary(scale * STUDENT, TEACHER, margin=scale).item()
    assert value == pytest.approx(scale**2 * activation_boundary(STUDENT, TEACHER, margin=1.0).item(), rel=1e-9)


def test_the_module_weighs_deep_layers_most_and_connects_the_channels() -> None:
    students = [wave((3, 5, 4, 6), 0.3, 0.1), wave((3, 4, 3, 2), 0.7, 0.4), wave((3, 2, 2, 2), 0.2, 0.3)]
    teachers = [wave((3, 3, 2, 3), 0.5, 0.2), wave((3, 7, 3, 2), 0.9, 0.6), wave((3, 6, 2, 2), 0.4, 0.5)]
    loss, total = built(students, teachers, margin=0.7), 0.0
    pooled = students[0].reshape(3, 5, 2, 2, 3, 2).mean((3, 5))
    for s, t, connector, weight in zip(
        (pooled, *students[1:]), teachers, loss.connectors, (0.25, 0.5, 1.0), strict=True
    ):
        connected = normalised(torch.einsum("dc,bchw->bdhw", connector[0].weight[:, :, 0, 0], s))
        total += weight * ab_by_loops(connected, t, 0.7)
    assert loss(outputs(*students), outputs(*teachers), None).item() == pytest.approx(total, rel=1e-9)


def test_a_larger_teacher_is_pooled() -> None:
    student, teacher = wave((3, 5, 2, 2), 0.3, 0.1), wave((3, 5, 4, 4), 0.5, 0.2)
    loss = built([student], [teacher])
    torch.nn.init.dirac_(loss.connectors[0][0].weight)
    value = loss(outputs(student), outputs(teacher), None).item()
    pooled = teacher.reshape(3, 5, 2, 2, 2, 2).mean((3, 5))
    assert value == pytest.approx(ab_by_loops(normalised(student), pooled, 1.0), rel=1e-9)


def test_the_margin_is_the_present_one() -> None:
    loss = built([SMALL], [SMALL_TEACHER])
    loss.margin = 0.25
    connected = loss.connectors[0](SMALL)
    value = loss(outputs(SMALL), outputs(SMALL_TEACHER), None).item()
    assert value == pytest.approx(ab_by_loops(connected, SMALL_TEACHER, 0.25), rel=1e-9)


def test_the_connectors_are_parameters_after_build() -> None:
    loss = built([STUDENT[:, :4]], [TEACHER])
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 4, 1, 1), (6,), (6,)]


def test_the_default_weight_is_the_authors_factor() -> None:
    assert AB(["layer"]).weight == 3 / 1000


def test_one_sample_large_and_constant_features_stay_finite() -> None:
    for scale in (1e4, 0.0):
        student = (STUDENT[:1] * scale).float().requires_grad_()
        loss = built([STUDENT], [TEACHER]).float()
        value = loss(outputs(student), outputs((TEACHER[:1] * scale).float()), None)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ab: expected maps \(B, C, H, W\), got \(4, 6\)"):
        built([STUDENT[:, :, 0, 0]], [TEACHER])
    with pytest.raises(ValueError, match=r"student features \(4, 6, 4, 8\) and teacher features \(4, 6, 8, 8\) differ"):
        activation_boundary(STUDENT[:, :, :4], TEACHER)


@pytest.mark.parametrize("margin", [-1.0, math.nan])
def test_a_negative_margin_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match=f"expected margin >= 0, got {margin}"):
        AB(["layer"], margin=margin)


def test_a_negative_weight_and_layers_without_partners_are_refused() -> None:
    with pytest.raises(ValueError, match="expected weight >= 0, got -1"):
        AB(["layer"], weight=-1)
    with pytest.raises(ValueError, match="expected one or more student layers and as many teacher layers"):
        AB(["a", "b"], ["c"])
