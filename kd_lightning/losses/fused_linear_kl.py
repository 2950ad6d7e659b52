"""Forward KL from the last hidden states, without the logits of all tokens in memory at any time.

The head and the loss are taken together, chunk by chunk, as in Liger Kernel (Hsu et al., 2024),
https://arxiv.org/abs/2410.10989, and Cut Your Losses (Wijmans et al., ICLR 2025), https://arxiv.org/abs/2411.09009.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_lightning.losses.base import check_temperature
from kd_lightning.losses.sequence_kl import _log_softmax


def fused_linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk_size: int = 64,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """T²·KL(p_t ‖ p_s) with p = softmax((h Wᵀ + b) / T), averaged over the tokens that count.

    The same as :func:`~kd_lightning.losses.forward_kl` of both models' logits, which at no time exist for more than
    ``chunk_size`` tokens: the gradients, of the size of the student's hidden states and head, are computed along with
    the value. Softmax and sums are in float32 where the products are in half precision (under autocast, or of half
    precision inputs). It cannot be differentiated twice.

    Shape:
        student_hidden, teacher_hidden: (N, D) and (N, E), or (B, S, D) and (B, S, E).
        student_head, teacher_head: (V, D) and (V, E), the heads' weights. student_bias, teacher_bias: (V,).
        target: (N,) or (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where
            none does.

    Raises:
        ValueError: For a temperature ≤ 0, a chunk_size < 1, or shapes that do not belong together.

    Example:
        >>> from kd_lightning.losses import forward_kl
        >>> hidden, head, teacher = torch.randn(6, 3), torch.randn(50, 3), torch.randn(6, 8)
        >>> teacher_head = torch.randn(50, 8)
        >>> fused = fused_linear_kl(hidden, head, teacher, teacher_head, chunk_size=4)
        >>> torch.allclose(fused, forward_kl(hidden @ head.T, teacher @ teacher_head.T), rtol=1e-4)
        True
    """
    check_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f"expected chunk_size >= 1, got {chunk_size}: the number of tokens whose logits are held")
    _check_side("student", student_hidden, student_head, student_bias)
    _check_side("teacher", teacher_hidden, teacher_head, teacher_bias)
    tokens = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != tokens or (target is not None and target.shape != tokens):
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)}, teacher_hidden {tuple(teacher_hidden.shape)} and target "
            f"{None if target is None else tuple(target.shape)} differ in their tokens: cut all to the same"
        )
    if len(student_head) != len(teacher_head):
        raise ValueError(
            f"student_head {tuple(student_head.shape)} and teacher_head {tuple(teacher_head.shape)} differ in their "
            "vocabulary: slice the heads to the tokens that both have"
        )
    hidden = [student_hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)]
    if target is not None:
        counted = target.flatten() != ignore_index
        hidden = [h[counted] for h in hidden]
    student = _in_one_precision(hidden[0], student_head, student_bias)
    teacher = _in_one_precision(
        hidden[1], teacher_head.detach(), None if teacher_bias is None else teacher_bias.detach()
    )
    graded = torch.is_grad_enabled()
    loss: Tensor = _FusedLinearKL.apply(*student, *teacher, temperature, chunk_size, graded)  # type: ignore[no-untyped-call]
    return loss


class _FusedLinearKL(torch.autograd.Function):
    """The loss, with its gradients computed along with it and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
        temperature: float,
        chunk_size: int,
        graded: bool,
    ) -> Tensor:
        wide = torch.promote_types(head.dtype, torch.float32)

        def log_probabilities(h: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
            return _log_softmax(F.linear(h, weight, b).to(wide), temperature)

        # Gradients are summed in the wide precision, and divided by the number of tokens at last: float16 has few
        # digits, or none, for quotients so small.
        of_hidden, of_head, of_bias = (
            torch.zeros_like(x, dtype=wide) if graded and x is not None and x.requires_grad else None
            for x in (hidden, head, bias)
        )
        total = hidden.new_zeros((), dtype=wide)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            log_s = log_probabilities(hidden[chunk], head, bias)
            log_t = log_probabilities(teacher_hidden[chunk], teacher_head, teacher_bias)
            p_t = log_t.exp()
            total += (p_t * (log_t - log_s)).sum()
            difference = log_s.exp() - p_t  # T/N times this is the gradient of the logits
            narrow = difference.to(head.dtype)
            if of_hidden is not None:
                of_hidden[chunk] = narrow @ head
            if of_head is not None and wide == head.dtype:
                of_head.addmm_(narrow.mT, hidden[chunk])
            elif of_head is not None:
                of_head += narrow.mT @ hidden[chunk]
            if of_bias is not None:
                of_bias += difference.sum(0)
        count = max(len(hidden), 1)
        for gradient in (of_hidden, of_head, of_bias):
            if gradient is not None:
                gradient *= temperature / count
        ctx.save_for_backward(of_hidden, of_head, of_bias)
        return total * (temperature**2 / count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Of the wide precision, which autograd takes back to that of the inputs.
        return *(None if x is None else of_loss * x for x in ctx.saved_tensors), *[None] * 6


def _in_one_precision(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return hidden states, head and bias in that of the products: autocast's, or the highest among them."""
    given = [x for x in tensors if x is not None]
    device = given[0].device.type
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in given])
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def _check_side(side: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim < 2 or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side}_hidden {tuple(hidden.shape)} and {side}_head {tuple(head.shape)} do not fit, expected (N, D) or "
            "(B, S, D) and (V, D): pass the weight of the head as nn.Linear has it"
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(
            f"expected {side}_bias ({len(head)},) for {side}_head {tuple(head.shape)}, got {tuple(bias.shape)}"
        )
