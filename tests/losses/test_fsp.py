import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_lightning import Outputs
from kd_lightning.losses import FSP, fsp
from kd_lightning.objective import DistillationObjective
from tests.losses.reference import numerical_gradient, wave

STUDENT = wave((2, 3, 4, 2), 0.37, 0.2), wave((2, 5, 4, 2), 0.41, 0.3)
TEACHER = wave((2, 3, 3, 5), 0.53, 0.9), wave((2, 5, 3, 5), 0.61, 0.8)  # other sizes than the student's

Pair = tuple[Tensor, Tensor]


def by_loops(student: Pair, teacher: Pair) -> float:
    def flow(first: Tensor, second: Tensor) -> list[float]:
        found = []
        for a, b in zip(first.flatten(2).tolist(), second.flatten(2).tolist(), strict=True):
            found += [sum(x * y for x, y in zip(i, j, strict=True)) / len(i) for i in a for j in b]
        return found

    squares = [(s - t) ** 2 for s, t in zip(flow(*student), flow(*teacher), strict=True)]
    return sum(squares) / len(squares)


def outputs(**features: Tensor) -> Outputs:
    return Outputs(torch.zeros(2, 2, dtype=torch.float64), features)


def test_value_of_the_code_of_published_tables() -> None:
    """Of HobbitLong/RepDistiller:distiller_zoo/FSP.py, where the first map is the larger."""
    student, teacher = (
        (wave((4, 6, 8, 8), *first), wave((4, 10, 4, 4), *second))
        for first, second in (((0.37, 0.2), (0.41, 0.3)), ((0.53, 0.9), (0.61, 0.8)))
    )
    assert fsp(student, teacher).item() == pytest.approx(1.84451198781191, rel=1e-12)


@pytest.mark.parametrize("index", [0, 1])
def test_value_and_gradient_equal_the_formula_for_other_sizes_and_widths(index: int) -> None:
    student = [x.clone().requires_grad_() for x in STUDENT]
    loss = fsp(tuple(student), TEACHER)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(STUDENT, TEACHER), rel=1e-12)

    def value(x: Tensor) -> float:
        return by_loops((x, STUDENT[1]) if index == 0 else (STUDENT[0], x), TEACHER)

    torch.testing.assert_close(student[index].grad, numerical_gradient(value, STUDENT[index]), rtol=1e-6, atol=1e-8)


def test_gradient_is_right_and_none_is_the_teachers() -> None:
    student = tuple(x.clone().requires_grad_() for x in STUDENT)
    assert torch.autograd.gradcheck(lambda a, b: fsp((a, b), TEACHER), student)
    teacher = tuple(x.clone().requires_grad_() for x in TEACHER)
    fsp(student, teacher).backward()
    assert teacher[0].grad is None
    assert teacher[1].grad is None


def test_zero_with_a_gradient_of_zero_where_the_student_equals_the_teacher() -> None:
    student = tuple(x.clone().requires_grad_() for x in STUDENT)
    loss = fsp(student, STUDENT)
    loss.backward()
    assert loss.item() == 0
    assert not student[0].grad.any()
    assert not student[1].grad.any()


@pytest.mark.parametrize(("first_size", "second_size"), [(8, 4), (4, 8)])
def test_the_larger_map_of_a_pair_is_average_pooled_to_the_smaller(first_size: int, second_size: int) -> None:
    def pooled(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], 4, x.shape[2] // 4, 4, x.shape[3] // 4).mean((3, 5))

    student, teacher = (
        (wave((2, 3, first_size, first_size), a, 0.1), wave((2, 5, second_size, second_size), a, 0.5))
        for a in (0.3, 0.7)
    )
    expected = by_loops(tuple(map(pooled, student)), tuple(map(pooled, teacher)))
    assert fsp(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25)
@given(places=st.permutations(range(8)), channels=st.permutations(range(5)), scale=st.floats(0.1, 10))
def test_order_and_opposite_scales_of_a_pair_change_nothing(places, channels, scale) -> None:
    def moved(x: Tensor) -> Tensor:
        return x.flatten(2)[..., places].reshape(x.shape)

    student = scale * moved(STUDENT[0]), moved(STUDENT[1][:, channels]) / scale
    value = fsp(student, (TEACHER[0], TEACHER[1][:, channels]))
    assert value.item() == pytest.approx(fsp(STUDENT, TEACHER).item(), rel=1e-9)


def test_one_sample_counts_as_itself() -> None:
    each = [fsp(tuple(x[i : i + 1] for x in STUDENT), tuple(x[i : i + 1] for x in TEACHER)).item() for i in range(2)]
    assert fsp(STUDENT, TEACHER).item() == pytest.approx(sum(each) / 2, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_zero_constant_and_extreme_maps_stay_finite(value: float) -> None:
    student = tuple((value * x.sign()).float().requires_grad_() for x in STUDENT)
    loss = fsp(student, tuple(x.float() for x in TEACHER))
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in student)


def test_the_module_is_the_sum_over_neighbours_in_the_list() -> None:
    third = wave((2, 4, 4, 2), 0.2, 0.1), wave((2, 4, 3, 5), 0.9, 0.7)
    loss = FSP(["a", "b", "c"], ["x", "y", "z"])
    student, teacher = outputs(a=STUDENT[0], b=STUDENT[1], c=third[0]), outputs(x=TEACHER[0], y=TEACHER[1], z=third[1])
    loss.build(student, teacher)
    expected = by_loops(STUDENT, TEACHER) + by_loops((STUDENT[1], third[0]), (TEACHER[1], third[1]))
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-12)


def test_other_channels_are_refused_before_training() -> None:
    objective = DistillationObjective({"fsp": FSP(["a", "b"], ["c", "d"])})
    student, teacher = outputs(a=STUDENT[0], b=STUDENT[1]), outputs(c=TEACHER[0], d=TEACHER[1][:, :4])
    with pytest.raises(ValueError, match=r"loss 'fsp' \(student 'a', 'b'.*has 5 channels and the teacher's 4"):
        objective.build(student, teacher)
    with pytest.raises(ValueError, match="fsp: the student's layer has 3 channels and the teacher's 5"):
        fsp(STUDENT, TEACHER[::-1])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fsp: expected maps \(B, C, H, W\), got \(2, 3\)"):
        fsp((STUDENT[0][..., 0, 0], STUDENT[1]), TEACHER)
    with pytest.raises(ValueError, match=r"fsp relates a layer to the next, expected two or more, got \['a'\]"):
        FSP(["a"])
    with pytest.raises(ValueError, match="as many teacher layers"):
        FSP(["a", "b"], ["c"])
