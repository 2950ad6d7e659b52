import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_lightning import Outputs
from kd_lightning.losses import Hint, hint
from tests.losses.reference import wave

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)


def outputs(feature: Tensor, layer: str = "layer") -> Outputs:
    return Outputs(torch.zeros(len(feature), 2, dtype=torch.float64), {layer: feature})


def built(student: Tensor, teacher: Tensor, **options: object) -> Hint:
    torch.manual_seed(0)
    loss = Hint("layer", **options)
    loss.build(outputs(student), outputs(teacher))
    return loss.double()


def test_value_of_the_authors() -> None:
    assert hint(STUDENT, TEACHER).item() == pytest.approx(8.988767844650246, rel=1e-13)


def test_value_and_gradient_equal_the_formula() -> None:
    student = STUDENT[:1, :2].clone().requires_grad_()
    loss = hint(student, TEACHER[:1, :2])
    loss.backward()
    pairs = list(zip(STUDENT[:1, :2].flatten().tolist(), TEACHER[:1, :2].flatten().tolist(), strict=True))
    assert loss.item() == pytest.approx(sum((s - t) ** 2 for s, t in pairs) / len(pairs), rel=1e-12)
    expected = [2 * (s - t) / len(pairs) for s, t in pairs]
    assert student.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: hint(s, TEACHER[:1, :1]), STUDENT[:1, :1].clone().requires_grad_())
    teacher = TEACHER.clone().requires_grad_()
    hint(STUDENT.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = hint(student, STUDENT)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@given(samples=st.permutations(range(4)), channels=st.permutations(range(6)), shift=st.floats(-9, 9))
def test_order_and_a_common_shift_change_nothing(samples: list[int], channels: list[int], shift: float) -> None:
    moved = hint((STUDENT + shift)[samples][:, channels], (TEACHER + shift)[samples][:, channels])
    assert moved.item() == pytest.approx(hint(STUDENT, TEACHER).item(), rel=1e-12)


def test_the_projector_maps_the_students_channels_to_the_teachers() -> None:
    teacher = wave((4, 9, 8, 8), 0.53, 0.9)
    loss = built(STUDENT, teacher)
    weight, bias = loss.projector.weight[:, :, 0, 0], loss.projector.bias
    projected = torch.einsum("dc,bchw->bdhw", weight, STUDENT) + bias[:, None, None]
    value = loss(outputs(STUDENT), outputs(teacher), None)
    torch.testing.assert_close(value, ((projected - teacher) ** 2).mean())


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_vectors_and_tokens_are_projected_linearly(shape: tuple[int, ...]) -> None:
    student, teacher = wave(shape, 0.37, 0.2), wave((*shape[:-1], 5), 0.53, 0.9)
    loss = built(student, teacher)
    projected = student @ loss.projector.weight.T + loss.projector.bias
    value = loss(outputs(student), outputs(teacher), None)
    torch.testing.assert_close(value, ((projected - teacher) ** 2).mean())


@pytest.mark.parametrize(("student_size", "teacher_size"), [(8, 4), (4, 8)])
def test_the_larger_map_is_average_pooled_to_the_smaller(student_size: int, teacher_size: int) -> None:
    student, teacher = (
        wave((2, 3, student_size, student_size), 0.3, 0.1),
        wave((2, 3, teacher_size, teacher_size), 0.7, 0),
    )
    loss = built(student, teacher)
    nn.init.dirac_(loss.projector.weight)
    nn.init.zeros_(loss.projector.bias)

    def pooled(x: Tensor) -> Tensor:
        return x.reshape(2, 3, 4, x.shape[2] // 4, 4, x.shape[3] // 4).mean((3, 5))

    value = loss(outputs(student), outputs(teacher), None)
    torch.testing.assert_close(value, ((pooled(student) - pooled(teacher)) ** 2).mean())


def test_a_larger_kernel_keeps_the_size_and_sees_neighbours() -> None:
    loss = built(STUDENT, TEACHER, kernel_size=3)
    other = STUDENT.clone()
    other[:, :, 0, 0] += 1
    difference = (loss.projector(other) - loss.projector(STUDENT)).abs().amax((0, 1))
    assert difference.shape == (8, 8)
    assert difference[:2, :2].min() > 0
    assert not difference[2:].any()


def test_a_batch_of_one_and_large_features_stay_finite() -> None:
    student = (STUDENT[:1] * 1e4).float().requires_grad_()
    loss = built(STUDENT, TEACHER).float()
    value = loss(outputs(student), outputs((TEACHER[:1] * 1e4).float()), None)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_layers_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer gives \(4, 6, 8, 8\) and the teacher's \(4, 6\), expected both"):
        built(STUDENT, TEACHER[:, :, 0, 0])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student features \(4, 6, 8, 8\) and teacher features \(4, 6, 4, 8\) differ"):
        hint(STUDENT, TEACHER[:, :, :4])


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an odd kernel_size, got 2"):
        Hint("layer", kernel_size=2)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="expected weight >= 0, got -100"):
        Hint("layer", weight=-100)


def test_the_teachers_layer_has_the_students_name_unless_given() -> None:
    assert Hint("a").teacher_layers == ("a",)
    assert Hint("a", "b").teacher_layers == ("b",)
