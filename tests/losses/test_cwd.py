import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import CWD, cwd
from tests.losses.reference import numerical_gradient, softmax, wave

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, OTHER = STUDENT[:2, :2, :3, :2], TEACHER[:2, :2, :3, :2]


def by_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.flatten(2).flatten(0, 1).tolist(), teacher.flatten(2).flatten(0, 1).tolist(), strict=True):
        pairs = zip(softmax(s, temperature), softmax(t, temperature), strict=True)
        total += sum(q * math.log(q / p) for p, q in pairs)
    return temperature**2 * total / (student.shape[0] * student.shape[1])


def outputs(logits: Tensor, **features: Tensor) -> Outputs:
    return Outputs(logits, features)


def built(student: Tensor, teacher: Tensor) -> CWD:
    torch.manual_seed(0)
    loss = CWD("a", "b")
    nothing = torch.zeros(2, 2)
    loss.build(outputs(nothing, a=student), outputs(nothing, b=teacher))
    return loss.double()


@pytest.mark.parametrize(("temperature", "value"), [(4.0, 4.189770198351919), (1.0, 2.4184160215033796)])
def test_value_of_the_authors(temperature: float, value: float) -> None:
    assert cwd(STUDENT, TEACHER, temperature=temperature).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_the_formula(temperature: float) -> None:
    student = SMALL.clone().requires_grad_()
    loss = cwd(student, OTHER, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(SMALL, OTHER, temperature), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, OTHER, temperature), SMALL.clone())
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: cwd(s, OTHER), SMALL.clone().requires_grad_())
    teacher = OTHER.clone().requires_grad_()
    cwd(SMALL.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = cwd(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT), rtol=0, atol=1e-14)


def test_extreme_maps_give_the_limit_and_not_nan() -> None:
    student = torch.tensor([1e4, -1e4, 0.0]).reshape(1, 1, 1, 3).requires_grad_()
    loss = cwd(student, torch.tensor([-1e4, 1e4, 0.0]).reshape(1, 1, 1, 3), temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad.flatten().tolist() == [1, -1, 0]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_map_is_the_uniform_distribution(value: float) -> None:
    student = torch.full((1, 1, 2, 4), value, requires_grad=True)
    teacher = torch.zeros(1, 1, 2, 4)
    teacher[0, 0, 0, 0] = 100
    loss = cwd(student, teacher, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(8))
    assert student.grad.isfinite().all()


@settings(max_examples=25)
@given(
    shift=st.lists(st.floats(-20, 20), min_size=6, max_size=6),
    places=st.permutations(range(64)),
    channels=st.permutations(range(6)),
    temperature=st.floats(0.5, 20),
)
def test_a_shift_of_a_channel_and_any_order_change_nothing(shift, places, channels, temperature) -> None:
    def moved(x: Tensor) -> Tensor:
        return x[:, channels].flatten(2)[..., places].reshape(x.shape)

    student = STUDENT + torch.tensor(shift, dtype=torch.float64)[:, None, None]
    expected = pytest.approx(cwd(STUDENT, TEACHER, temperature=temperature).item(), rel=1e-9)
    assert cwd(moved(student), moved(TEACHER), temperature=temperature).item() == expected


def test_without_a_layer_the_module_is_the_function_of_the_logits_at_its_present_temperature() -> None:
    loss = CWD()
    loss.build(outputs(SMALL), outputs(OTHER))
    assert loss.needs_same_classes
    assert not list(loss.parameters())
    for temperature in (4.0, 2.0):
        loss.temperature = temperature
        value = loss(outputs(SMALL), outputs(OTHER), torch.full((2, 3, 2), -100))
        assert value.item() == pytest.approx(by_loops(SMALL, OTHER, temperature), rel=1e-12)


def test_maps_of_equal_channels_are_compared_as_they_are() -> None:
    loss = built(SMALL, OTHER)
    assert not list(loss.parameters())
    assert not loss.needs_same_classes
    value = loss(outputs(SMALL, a=SMALL), outputs(OTHER, b=OTHER), None)
    assert value.item() == pytest.approx(by_loops(SMALL, OTHER, 4.0), rel=1e-12)


def test_other_channels_are_projected() -> None:
    teacher = wave((2, 5, 3, 2), 0.7, 0.2)
    loss = built(SMALL, teacher)
    assert len(list(loss.parameters())) == 2
    weight, bias = loss.projector.weight[:, :, 0, 0], loss.projector.bias
    projected = torch.einsum("dc,bchw->bdhw", weight, SMALL) + bias[:, None, None]
    value = loss(outputs(SMALL, a=SMALL), outputs(OTHER, b=teacher), None)
    assert value.item() == pytest.approx(by_loops(projected, teacher, 4.0), rel=1e-10)
    value.backward()
    assert loss.projector.weight.grad.any()


def test_the_larger_map_is_average_pooled_to_the_smaller() -> None:
    student, teacher = wave((2, 3, 8, 4), 0.3, 0.1), wave((2, 3, 4, 2), 0.7, 0.0)
    pooled = nn.functional.avg_pool2d(student, 2)
    value = built(student, teacher)(outputs(student, a=student), outputs(teacher, b=teacher), None)
    assert value.item() == pytest.approx(by_loops(pooled, teacher, 4.0), rel=1e-12)
    value = built(teacher, student)(outputs(teacher, a=teacher), outputs(student, b=student), None)
    assert value.item() == pytest.approx(by_loops(teacher, pooled, 4.0), rel=1e-12)


def test_the_teachers_layer_has_the_students_name_unless_given() -> None:
    assert CWD("a").teacher_layers == ("a",)
    assert (CWD("a", "b").student_layers, CWD("a", "b").teacher_layers) == (("a",), ("b",))
    assert (CWD().student_layers, CWD().teacher_layers) == ((), ())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"expected temperature > 0, got {temperature}"):
        CWD(temperature=temperature)
    with pytest.raises(ValueError, match="expected temperature > 0"):
        cwd(SMALL, OTHER, temperature=temperature)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"student maps \(4, 6, 8, 8\) and teacher maps \(4, 5, 8, 8\) differ"):
        cwd(STUDENT, TEACHER[:, :5])
    with pytest.raises(ValueError, match=r"cwd: expected maps \(B, C, H, W\), got \(4, 6\)"):
        CWD().build(outputs(STUDENT[..., 0, 0]), outputs(TEACHER[..., 0, 0]))
    with pytest.raises(ValueError, match=r"cwd: expected maps \(B, C, H, W\), got \(4, 6\)"):
        cwd(STUDENT[..., 0, 0], TEACHER[..., 0, 0])
    with pytest.raises(ValueError, match="expected a student_layer to compare with 'b', got None"):
        CWD(teacher_layer="b")
