import functools
import math

import pytest
import torch
from torch import Tensor

from kd_lightning.losses import (
    forward_kl,
    fused_linear_divergence,
    fused_linear_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    symmetric_kl,
    total_variation,
)
from tests.losses.test_fused_linear_kl import TARGET, D, E, N, V, allocations, inputs

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": functools.partial(symmetric_kl, lam=0.3),
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": functools.partial(skewed_reverse_kl, lam=0.4),
    "jensen_shannon": functools.partial(jensen_shannon, beta=0.2),
    "total_variation": total_variation,
}


def fused(divergence, student: list[Tensor], teacher: list[Tensor], target: Tensor | None = None, **options) -> Tensor:
    biases = {"student_bias": student[2], "teacher_bias": teacher[2]}
    return fused_linear_divergence(divergence, *student[:2], *teacher[:2], target, **biases, **options)


def logits(side: list[Tensor]) -> Tensor:
    return side[0] @ side[1].T + side[2]


def gradients(value: Tensor, student: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, student))


@pytest.mark.parametrize("target", [None, TARGET], ids=["all", "some"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradients_are_those_of_the_whole_logits(name: str, temperature: float, target) -> None:
    divergence = functools.partial(DIVERGENCES[name], temperature=temperature)
    (mine, teacher), (others, _) = inputs(), inputs()
    value = fused(divergence, mine, teacher, target, chunk_size=3)
    expected = divergence(logits(others), logits(teacher), target)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for x, y in zip(gradients(value, mine), gradients(expected, others), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_sequences_under_autocast_are_as_right_as_half_precision_products(name: str) -> None:
    exact, exact_teacher = inputs(6)
    expected = DIVERGENCES[name](logits(exact), logits(exact_teacher), TARGET[:6])
    student, teacher = inputs(6, dtype=torch.float32)
    student[0], teacher[0] = student[0].detach().reshape(2, 3, D).requires_grad_(), teacher[0].reshape(2, 3, E)
    with torch.autocast("cpu", torch.bfloat16):
        value = fused(DIVERGENCES[name], student, teacher, TARGET[:6].reshape(2, 3), chunk_size=2)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=0.02)
    for x, y in zip(gradients(value, student), gradients(expected, exact), strict=True):
        assert x.dtype == torch.float32
        assert (x.reshape(y.shape) - y).norm() < 0.05 * y.norm()  # three digits, less where differences are taken


def test_a_teacher_of_half_precision_is_softened_in_float32() -> None:
    student, _ = inputs(dtype=torch.float32)
    _, teacher = inputs(dtype=torch.bfloat16)
    value = fused(reverse_kl, student, teacher)
    products = torch.nn.functional.linear(teacher[0], teacher[1], teacher[2])
    assert value.item() == pytest.approx(reverse_kl(logits(student), products.float()).item(), rel=1e-5)


def test_a_loss_of_ones_own() -> None:
    def squares(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().sum(-1).mean()

    (mine, teacher), (others, _) = inputs(), inputs()
    value, expected = fused(squares, mine, teacher, chunk_size=2), squares(logits(others), logits(teacher))
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for x, y in zip(gradients(value, mine), gradients(expected, others), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_forward_kl_by_autograd_is_that_by_hand_at_extreme_logits_and_ruled_out_tokens() -> None:
    student, teacher = inputs()
    student[1] = (student[1].detach() * 1e3).requires_grad_()
    ruled_out = torch.tensor([0.0] * 9 + [-torch.inf] * 2, dtype=torch.float64)
    student[2], teacher[2] = (student[2].detach() + ruled_out).requires_grad_(), teacher[2] + ruled_out
    by_autograd = fused(forward_kl, student, teacher)
    by_hand = fused_linear_kl(*student[:2], *teacher[:2], student_bias=student[2], teacher_bias=teacher[2])
    assert by_autograd.item() == pytest.approx(by_hand.item(), rel=1e-12)
    for x, y in zip(gradients(by_autograd, student), gradients(by_hand, student), strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, D), (0, 5, D), (2, 0, D)])
def test_zero_with_gradients_of_zero_for_an_empty_batch(shape: tuple[int, ...]) -> None:
    hidden, (student, teacher) = torch.zeros(shape, requires_grad=True), inputs(dtype=torch.float32)
    value = fused(reverse_kl, [hidden, *student[1:]], [torch.zeros(*shape[:-1], E), *teacher[1:]])
    value.backward()
    assert value == 0
    assert hidden.grad.shape == shape
    assert not any(x.grad.any() for x in student[1:])


def test_no_graph_is_built_where_none_is_recorded() -> None:
    student, teacher = inputs(20)
    graphs = []

    def watched(z_s: Tensor, z_t: Tensor) -> Tensor:
        value = reverse_kl(z_s, z_t)
        graphs.append(value.requires_grad)
        return value

    with torch.no_grad(), allocations() as shapes:
        value = fused(watched, student, teacher, chunk_size=4)
    frozen = fused(watched, [x.detach() for x in student], teacher, chunk_size=4)
    assert value.item() == frozen.item() == pytest.approx(reverse_kl(logits(student), logits(teacher)).item())
    assert not any(graphs)
    assert (V, D) not in shapes


def test_the_logits_of_all_tokens_are_never_held() -> None:
    student, teacher = inputs(256)
    with allocations() as shapes:
        fused(jensen_shannon, student, teacher, chunk_size=8).backward()
    assert (8, V) in shapes
    assert max(map(math.prod, shapes)) == 256 * E  # the hidden states


def test_what_a_divergence_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected beta in \(0, 1\), got 1.5"):
        fused(functools.partial(jensen_shannon, beta=1.5), *inputs())
    with pytest.raises(ValueError, match=r"expected the mean over tokens from the loss, a scalar, got \(7,\)"):
        fused(lambda z_s, z_t: (z_s - z_t).sum(-1), *inputs(), chunk_size=N)


def test_a_temperature_that_is_learnt_is_refused_as_it_would_get_no_gradient() -> None:
    learnt = torch.tensor(2.0, requires_grad=True)
    student, teacher = inputs()
    with pytest.raises(ValueError, match="expected temperature to be a number, got a tensor that is learnt"):
        fused(functools.partial(reverse_kl, temperature=learnt), student, teacher)
    with pytest.raises(ValueError, match="expected temperature to be a number"):
        fused_linear_kl(*student[:2], *teacher[:2], temperature=learnt)
    fixed = fused_linear_kl(*student[:2], *teacher[:2], temperature=learnt.detach())
    assert fixed == fused_linear_kl(*student[:2], *teacher[:2], temperature=2.0)
