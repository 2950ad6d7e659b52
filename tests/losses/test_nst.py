import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import NST, nst
from tests.losses.reference import numerical_gradient, wave

STUDENT, TEACHER = wave((4, 6, 8, 8), 0.37, 0.2), wave((4, 6, 8, 8), 0.53, 0.9)
SMALL, WIDE = wave((2, 3, 4, 2), 0.37, 0.2), wave((2, 5, 4, 2), 0.53, 0.9)


def by_loops(student: Tensor, teacher: Tensor) -> float:
    def channels(sample: Tensor) -> list[list[float]]:
        return [[v / (math.hypot(*c) or 1) for v in c] for c in sample.flatten(1).tolist()]

    def kernel(one: list[list[float]], other: list[list[float]]) -> float:
        values = [sum(x * y for x, y in zip(a, b, strict=True)) ** 2 for a in one for b in other]
        return sum(values) / len(values)

    total = 0.0
    for s, t in zip(map(channels, student), map(channels, teacher), strict=True):
        total += kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    return total / len(student)


def test_value_of_the_authors() -> None:
    assert nst(STUDENT, TEACHER).item() == pytest.approx(0.9897850684413074, rel=1e-12)


def test_value_and_gradient_equal_the_formula_for_different_channels() -> None:
    student = SMALL.clone().requires_grad_()
    loss = nst(student, WIDE)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(SMALL, WIDE), rel=1e-12)
    expected = numerical_gradient(lambda s: by_loops(s, WIDE), SMALL)
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    assert torch.autograd.gradcheck(lambda s: nst(s, WIDE), SMALL.clone().requires_grad_())
    teacher = WIDE.clone().requires_grad_()
    nst(SMALL.clone().requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = nst(student, STUDENT.clone())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros_like(STUDENT), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(8, 4), (4, 8)])
def test_the_larger_map_is_average_pooled_to_the_smaller(student_size: int, teacher_size: int) -> None:
    student, teacher = (
        wave((2, 3, student_size, student_size), 0.3, 0.1),
        wave((2, 5, teacher_size, teacher_size), 0.7, 0.0),
    )

    def pooled(x: Tensor) -> Tensor:
        return x.reshape(2, x.shape[1], 4, x.shape[2] // 4, 4, x.shape[3] // 4).mean((3, 5))

    assert nst(student, teacher).item() == pytest.approx(by_loops(pooled(student), pooled(teacher)), rel=1e-12)


@settings(max_examples=25)
@given(
    scales=st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    samples=st.permutations(range(4)),
    channels=st.permutations(range(6)),
    places=st.permutations(range(64)),
)
def test_each_channels_scale_and_any_order_change_nothing(scales, samples, channels, places) -> None:
    def moved(x: Tensor) -> Tensor:
        return x[samples].flatten(2)[..., places].reshape(x.shape)

    student = -STUDENT * torch.tensor(scales, dtype=torch.float64)[:, None, None]
    expected = pytest.approx(nst(STUDENT, TEACHER).item(), rel=1e-9)
    assert nst(moved(student[:, channels]), moved(TEACHER)).item() == expected


def test_one_sample_counts_as_itself() -> None:
    each = [nst(STUDENT[i : i + 1], TEACHER[i : i + 1]).item() for i in range(4)]
    assert nst(STUDENT, TEACHER).item() == pytest.approx(sum(each) / 4, rel=1e-12)


@pytest.mark.parametrize("name", ["zero", "dead channel", "constant", "extreme"])
def test_edges_stay_finite(name: str) -> None:
    features = {
        "zero": torch.zeros(1, 3, 4, 2),
        "dead channel": SMALL[:1].float() * torch.tensor([0.0, 1, 1])[:, None, None],
        "constant": torch.ones(1, 3, 4, 2),
        "extreme": (SMALL[:1].sign() * 1e4).float(),
    }
    student = features[name].clone().requires_grad_()
    loss = nst(student, WIDE[:1].float())
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(features[name], WIDE[:1]), rel=1e-5)
    assert student.grad.abs().max() < 10
    assert nst(WIDE[:1].float(), features[name]).isfinite()


def test_nothing_grows_with_the_square_of_batch_times_channels() -> None:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        nst(wave((16, 12, 4, 4), 0.3, 0.1).requires_grad_(), wave((16, 10, 4, 4), 0.7, 0.0))
    assert max(sizes) <= 16 * 12 * 16


def test_the_module_is_the_sum_over_layers() -> None:
    loss = NST(["a", "b"], ["c", "d"])
    student = Outputs(torch.zeros(2, 2), {"a": SMALL, "b": WIDE})
    teacher = Outputs(torch.zeros(2, 2), {"c": WIDE, "d": SMALL.sin()})
    expected = by_loops(SMALL, WIDE) + by_loops(WIDE, SMALL.sin())
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nst: expected maps \(B, C, H, W\), got \(4, 6\)"):
        nst(STUDENT[..., 0, 0], TEACHER)
    with pytest.raises(ValueError, match=r"nst: expected maps \(B, C, H, W\), got \(4, 6, 8\)"):
        nst(STUDENT, TEACHER[..., 0])
    with pytest.raises(ValueError, match="as many teacher layers"):
        NST(["a", "b"], ["c"])
