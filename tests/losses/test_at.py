import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import AT, attention_transfer
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, WIDE = wave((2, 3, 4, 2), 0.37, 0.2), wave((2, 5, 4, 2), 0.53, 0.9)


def by_loops(student: Tensor, teacher: Tensor, p: float = 2) -> float:
    def attention(maps: list[list[list[float]]]) -> list[float]:
        height, width = len(maps[0]), len(maps[0][0])
        q = [sum(abs(m[i][j]) ** p for m in maps) / len(maps) for i in range(height) for j in range(width)]
        return [x / math.sqrt(sum(y * y for y in q)) for x in q]

    squares = [
        (a - b) ** 2
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        for a, b in zip(attention(s), attention(t), strict=True)
    ]
    return sum(squares) / len(squares)


def test_value_of_the_authors() -> None:
    assert attention_transfer(STUDENT, TEACHER).item() == pytest.approx(0.0003328581851229361, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_value_and_gradient_equal_the_formula(p: float) -> None:
    student = SMALL.clone().requires_grad_()
    loss = attention_transfer(student, WIDE, p=p)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(SMALL, WIDE, p), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, WIDE, p), SMALL)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    teacher = WIDE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: attention_transfer(s, WIDE), SMALL.clone().requires_grad_())
    attention_transfer(SMALL.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = attention_transfer(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize(("student_size", "teacher_size"), [(8, 4), (4, 8)])
def test_the_larger_map_is_average_pooled_to_the_smaller(student_size: int, teacher_size: int) -> None:
    student, teacher = (
        wave((2, 3, student_size, student_size), 0.3, 0.1),
        wave((2, 5, teacher_size, teacher_size), 0.7, 0.0),
    )

    def pooled(x: Tensor) -> Tensor:
        return x.reshape(2, x.shape[1], 4, x.shape[2] // 4, 4, x.shape[3] // 4).mean((3, 5))

    expected = by_loops(pooled(student), pooled(teacher))
    assert attention_transfer(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25)
@given(scale=st.floats(0.1, 10), samples=st.permutations(range(4)), channels=st.permutations(range(6)))
def test_scale_order_and_sign_change_nothing(scale: float, samples: list[int], channels: list[int]) -> None:
    moved = attention_transfer(-scale * STUDENT[samples][:, channels], TEACHER[samples])
    assert moved.item() == pytest.approx(attention_transfer(STUDENT, TEACHER).item(), rel=1e-9)


def test_one_sample_counts_as_itself() -> None:
    each = [attention_transfer(STUDENT[i : i + 1], TEACHER[i : i + 1]).item() for i in range(4)]
    assert attention_transfer(STUDENT, TEACHER).item() == pytest.approx(sum(each) / 4, rel=1e-12)


@pytest.mark.parametrize("feature", [torch.zeros(1, 3, 4, 2), torch.ones(1, 3, 4, 2), (SMALL[:1].sign() * 1e4).float()])
def test_zero_constant_and_extreme_maps_stay_finite(feature: Tensor) -> None:
    student = feature.clone().requires_grad_()
    for teacher in (WIDE[:1].float(), torch.zeros(1, 5, 4, 2)):
        loss = attention_transfer(student, teacher, p=4)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.abs().max() < 10


def test_the_module_is_the_sum_over_layers_at_its_present_power() -> None:
    loss = AT(["a", "b"], ["c", "d"], p=2)
    student = Outputs(torch.zeros(4, 2), {"a": STUDENT, "b": 2 * TEACHER})
    teacher = Outputs(torch.zeros(4, 2), {"c": TEACHER, "d": STUDENT.sin()})
    for p in (2, 4):
        loss.p = p
        expected = by_loops(STUDENT, TEACHER, p) + by_loops(TEACHER, STUDENT.sin(), p)
        assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-10)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_transfer: expected maps \(B, C, H, W\), got \(4, 6\)"):
        attention_transfer(STUDENT, TEACHER[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"expected maps .* got \(4, 6, 8\)"):
        attention_transfer(STUDENT[..., 0], TEACHER)
    with pytest.raises(ValueError, match=r"expected p >= 1, got 0\.5"):
        AT(["a"], p=0.5)
    with pytest.raises(ValueError, match="expected p >= 1, got nan"):
        attention_transfer(STUDENT, TEACHER, p=math.nan)
    with pytest.raises(ValueError, match="as many teacher layers"):
        AT(["a", "b"], ["c"])
