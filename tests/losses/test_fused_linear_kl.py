import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_lightning.losses import fused_linear_kl
from tests.losses.reference import wave

N, V, D, E = 7, 11, 3, 5
TARGET = torch.tensor([4, -100, 0, 10, -100, 2, 2])


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states, head and bias: the student's, which are to be learnt, and the teacher's."""
    student = [wave((n, D), 0.7, 0.1), wave((V, D), 1.3, 0.5), wave((V,), 0.9, 0.2)]
    teacher = [wave((n, E), 0.37, 0.4), wave((V, E), 0.53, 0.9) / 3, wave((V,), 0.61, 0.8)]
    return [x.to(dtype).requires_grad_() for x in student], [x.to(dtype) for x in teacher]


def fused(student: list[Tensor], teacher: list[Tensor], target: Tensor | None = None, **options) -> Tensor:
    biases = {"student_bias": student[2], "teacher_bias": teacher[2]}
    return fused_linear_kl(*student[:2], *teacher[:2], target, **biases, **options)


def naive(
    student: list[Tensor], teacher: list[Tensor], target: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """The formula on logits that are held all at once."""
    z_s, z_t = (hidden @ head.T + bias for hidden, head, bias in (student, teacher))
    p_s, p_t = torch.softmax(z_s / temperature, -1), torch.softmax(z_t / temperature, -1)
    divergences = temperature**2 * (p_t * (p_t / p_s).log()).sum(-1)
    return divergences.mean() if target is None else divergences[target != -100].mean()


class Allocations(TorchDispatchMode):
    """Records the shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes += [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor)]
        return result


@contextmanager
def allocations() -> Iterator[list[tuple[int, ...]]]:
    with Allocations() as recorded:
        yield recorded.shapes


@pytest.mark.parametrize("target", [None, TARGET], ids=["all", "some"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 64])
def test_value_and_gradients_are_those_of_the_whole_logits(chunk_size: int, temperature: float, target) -> None:
    mine, teacher = inputs()
    others, _ = inputs()
    value = fused(mine, teacher, target, temperature=temperature, chunk_size=chunk_size)
    expected = naive(others, teacher, target, temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    expected.backward()
    for x, y in zip(mine, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_gradient_is_right() -> None:
    student, teacher = inputs(4)
    target = torch.tensor([1, -100, 2, 3])
    assert torch.autograd.gradcheck(
        lambda *x: fused(list(x), teacher, target, temperature=2.0, chunk_size=2), tuple(student)
    )


def test_value_by_hand() -> None:
    # p_t = (3/4, 1/4), p_s = (1/2, 1/2); their hidden states are of different widths
    student = torch.zeros(1, 1), torch.ones(2, 1)
    teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.log(3), 5.0], [0.0, 7.0]])
    value = fused_linear_kl(*student, *teacher)
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_without_biases() -> None:
    student, teacher = inputs()
    value = fused_linear_kl(*student[:2], *teacher[:2], chunk_size=3)
    zeros = torch.zeros(V, dtype=torch.float64)
    assert value.item() == pytest.approx(naive([*student[:2], zeros], [*teacher[:2], zeros]).item(), rel=1e-12)


def test_sequences_are_their_tokens() -> None:
    student, teacher = inputs(6)
    sequences = [student[0].reshape(2, 3, D), student[1], student[2]], [teacher[0].reshape(2, 3, E), *teacher[1:]]
    value = fused(*sequences, TARGET[:6].reshape(2, 3), chunk_size=2)
    expected = naive(*inputs(6), TARGET[:6])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, student[0])
    others, _ = inputs(6)
    (expected_gradient,) = torch.autograd.grad(naive(others, teacher, TARGET[:6]), others[0])
    torch.testing.assert_close(gradient, expected_gradient)


def test_ignored_tokens_get_no_gradient_whatever_their_index() -> None:
    student, teacher = inputs()
    target = torch.where(TARGET == -100, 0, 1)
    value = fused(student, teacher, target, ignore_index=0)
    value.backward()
    assert value == fused(student, teacher, TARGET)
    assert not student[0].grad[TARGET == -100].any()
    assert student[0].grad[TARGET != -100].any(-1).all()


def test_zero_with_gradients_of_zero_where_no_token_counts() -> None:
    student, teacher = inputs()
    value = fused(student, teacher, torch.full((N,), -100))
    value.backward()
    assert value == 0
    for x in student:
        assert x.grad.shape == x.shape
        assert not x.grad.any()


def test_zero_with_gradients_of_zero_where_the_student_equals_the_teacher() -> None:
    student, _ = inputs()
    value = fused(student, [x.detach().clone() for x in student], temperature=2.0, chunk_size=3)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert max(x.grad.abs().max() for x in student) < 1e-14


def test_gradient_scales_with_what_comes_after() -> None:
    student, teacher = inputs()
    once = torch.autograd.grad(fused(student, teacher), student)
    loss = fused(student, teacher)
    scaled = (3.0 * loss) ** 2
    expected = [2 * 9 * loss.item() * g for g in once]
    torch.testing.assert_close(list(torch.autograd.grad(scaled, student, retain_graph=True)), expected)
    torch.testing.assert_close(list(torch.autograd.grad(scaled, student)), expected)  # nothing was used up


def test_a_head_that_is_used_elsewhere_too_gets_both_gradients() -> None:
    def loss_of(divergence, student: list[Tensor]) -> Tensor:
        embedded = student[1][torch.tensor([1, 5, 5, 0, 2, 9, 3])]  # the head is the table of embeddings
        return divergence([embedded * 0.5, student[1], student[2]], inputs()[1]) + student[1].square().mean()

    mine, others = inputs()[0], inputs()[0]
    loss_of(fused, mine).backward()
    loss_of(naive, others).backward()
    torch.testing.assert_close(mine[1].grad, others[1].grad, rtol=1e-10, atol=1e-12)
    assert mine[1].grad[7].any()


def test_teacher_gets_no_gradient() -> None:
    student, teacher = inputs()
    teacher = [x.requires_grad_() for x in teacher]
    fused(student, teacher).backward()
    assert all(x.grad is not None for x in student)
    assert all(x.grad is None for x in teacher)
    assert not fused([x.detach() for x in student], teacher).requires_grad


@pytest.mark.parametrize("learnt", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_nobody_needs_are_not_computed(learnt: tuple[bool, ...]) -> None:
    mine, teacher = inputs(20)
    student = [x.detach().requires_grad_(needed) for x, needed in zip(mine, learnt, strict=True)]
    with allocations() as shapes:
        fused(student, teacher, chunk_size=4).backward()
    expected = torch.autograd.grad(naive(mine, teacher), mine)
    assert tuple(shape in shapes for shape in ((20, D), (V, D))) == learnt[:2]
    for x, y, needed in zip(student, expected, learnt, strict=True):
        assert (x.grad is not None) == needed
        if needed:
            torch.testing.assert_close(x.grad, y)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_gradient_is_computed_where_none_is_recorded(frozen: bool) -> None:
    student, teacher = inputs(20)
    if frozen:
        student = [x.detach() for x in student]
    with allocations() as shapes, torch.set_grad_enabled(frozen):
        value = fused(student, teacher, chunk_size=4)
    assert not value.requires_grad
    assert value.item() == pytest.approx(naive(student, teacher).item(), rel=1e-12)
    assert (V, D) not in shapes


def test_the_logits_of_all_tokens_are_never_held() -> None:
    n, v, chunk_size = 256, 50, 8
    student = [wave((n, D), 0.7, 0.1), wave((v, D), 1.3, 0.5), wave((v,), 0.9, 0.2)]
    teacher = [wave((n, E), 0.37, 0.4), wave((v, E), 0.53, 0.9), wave((v,), 0.61, 0.8)]
    student = [x.requires_grad_() for x in student]
    target = torch.arange(n) % v
    with allocations() as shapes:
        fused(student, teacher, target, chunk_size=chunk_size).backward()
    assert (chunk_size, v) in shapes
    # The largest tensors are hidden states, which the models hold anyhow.
    assert max(map(math.prod, shapes)) == n * E
    with allocations() as shapes:
        naive(student, teacher, target).backward()
    assert max(map(math.prod, shapes)) == n * v


def test_under_autocast_it_is_as_right_as_whole_logits_and_gradients_come_in_the_inputs_precision() -> None:
    exact, exact_teacher = inputs()
    expected = torch.autograd.grad(naive(exact, exact_teacher, TARGET), exact)
    student, teacher = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = fused(student, teacher, TARGET, chunk_size=2)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(naive(exact, exact_teacher, TARGET).item(), rel=0.02)
    for x, y in zip(student, expected, strict=True):
        assert x.grad.dtype == torch.float32
        assert (x.grad - y).norm() < 0.02 * y.norm()


def test_autocast_leaves_float64_alone() -> None:
    student, teacher = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        value = fused(student, teacher)
    assert value.item() == pytest.approx(naive(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_get_gradients_as_right_as_their_precision(dtype: torch.dtype) -> None:
    student, teacher = inputs(dtype=dtype)
    value = fused(student, teacher, TARGET, chunk_size=2)
    value.backward()
    exact, exact_teacher = [x.detach().double().requires_grad_() for x in student], [x.double() for x in teacher]
    expected = torch.autograd.grad(naive(exact, exact_teacher, TARGET), exact)
    assert value.item() == pytest.approx(naive(exact, exact_teacher, TARGET).item(), rel=0.02)
    for x, y in zip(student, expected, strict=True):
        assert x.grad.dtype == dtype
        assert (x.grad - y).norm() < 0.02 * y.norm()


def test_many_tokens_leave_small_gradients_in_float16() -> None:
    # p_s of the second token is 1.2e-4 too large; divided by 4096 that is 3e-8, half the least number of float16.
    student = torch.ones(4096, 1, dtype=torch.float16), torch.tensor([[0.0], [-9.0]], dtype=torch.float16)
    teacher = student[0], torch.tensor([[0.0], [-20.0]], dtype=torch.float16)
    head = student[1].requires_grad_()
    fused_linear_kl(student[0], head, *teacher, chunk_size=512).backward()
    excess = 1 / (1 + math.exp(9)) - 1 / (1 + math.exp(20))
    assert head.grad.flatten().tolist() == pytest.approx([-excess, excess], rel=0.01)


def test_finite_at_extreme_logits() -> None:
    student = (
        torch.tensor([[1.0], [-1.0]], requires_grad=True),
        torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True),
    )
    teacher = torch.tensor([[-1.0], [-1.0]]), torch.tensor([[1e4], [-1e4], [0.0]])
    value = fused_linear_kl(*student, *teacher)
    value.backward()
    assert value.item() == 1e4  # log p of the teacher's token is -2e4 in the first row, 0 in the second
    assert student[0].grad.tolist() == [[1e4], [0.0]]
    assert student[1].grad.tolist() == [[0.5], [-0.5], [0.0]]


def test_tokens_that_a_bias_of_minus_infinity_rules_out_add_nothing() -> None:
    student, teacher = inputs()
    expected = naive([student[0], student[1][:9], student[2][:9]], [teacher[0], teacher[1][:9], teacher[2][:9]])
    ruled_out = torch.tensor([0.0] * 9 + [-torch.inf] * 2, dtype=torch.float64)
    value = fused([*student[:2], student[2] + ruled_out], [*teacher[:2], teacher[2] + ruled_out])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(value, student)
    for x, y in zip(gradients, torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(x, y)


@settings(max_examples=25)
@given(tokens=st.permutations(range(N)), classes=st.permutations(range(V)), shift=st.floats(-20, 20))
def test_order_and_a_shift_of_all_logits_change_nothing(tokens, classes, shift: float) -> None:
    student, teacher = inputs()
    mine = [student[0][tokens], student[1][classes], student[2][classes] + shift]
    theirs = [teacher[0][tokens], teacher[1][classes], teacher[2][classes] - shift]
    value = fused(mine, theirs, TARGET[tokens], chunk_size=3)
    assert value.item() == pytest.approx(fused(student, teacher, TARGET).item(), rel=1e-9)


def test_shapes_that_do_not_fit_are_refused() -> None:
    (hidden, head, bias), (teacher_hidden, teacher_head, _) = inputs()
    with pytest.raises(
        ValueError, match=r"student_hidden \(7, 3\) and student_head \(3, 11\) do not fit, .* nn.Linear"
    ):
        fused_linear_kl(hidden, head.T, teacher_hidden, teacher_head)
    with pytest.raises(ValueError, match=r"teacher_hidden \(7, 5\) and teacher_head \(11, 3\) do not fit"):
        fused_linear_kl(hidden, head, teacher_hidden, head)
    with pytest.raises(ValueError, match=r"student_hidden \(3,\) and student_head \(11, 3\) do not fit"):
        fused_linear_kl(hidden[0], head, teacher_hidden[0], teacher_head)
    with pytest.raises(ValueError, match=r"student_hidden \(7, 3\), teacher_hidden \(6, 5\) .* differ in their tokens"):
        fused_linear_kl(hidden, head, teacher_hidden[:6], teacher_head)
    with pytest.raises(ValueError, match=r"and target \(6,\) differ in their tokens"):
        fused_linear_kl(hidden, head, teacher_hidden, teacher_head, TARGET[:6])
    with pytest.raises(
        ValueError, match=r"student_head \(11, 3\) and teacher_head \(9, 5\) differ in their vocabulary"
    ):
        fused_linear_kl(hidden, head, teacher_hidden, teacher_head[:9])
    with pytest.raises(ValueError, match=r"expected student_bias \(11,\) for student_head \(11, 3\), got \(9,\)"):
        fused_linear_kl(hidden, head, teacher_hidden, teacher_head, student_bias=bias[:9])
    with pytest.raises(ValueError, match=r"expected teacher_bias \(11,\)"):
        fused_linear_kl(hidden, head, teacher_hidden, teacher_head, teacher_bias=bias[:, None])


def test_a_wrong_temperature_or_chunk_size_is_refused() -> None:
    student, teacher = inputs()
    with pytest.raises(ValueError, match=r"expected temperature > 0, got 0.0"):
        fused(student, teacher, temperature=0.0)
    with pytest.raises(ValueError, match=r"expected chunk_size >= 1, got 0: the number of tokens whose logits"):
        fused(student, teacher, chunk_size=0)
