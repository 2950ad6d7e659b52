"""A head and a loss of its logits taken together, without the logits of all tokens in memory at any time.

Chunk by chunk, with the gradients computed along with the value, as in Liger Kernel (Hsu et al., 2024),
https://arxiv.org/abs/2410.10989, and Cut Your Losses (Wijmans et al., ICLR 2025), https://arxiv.org/abs/2411.09009.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# MB of logits that exist at a time. More makes products larger, and goes over the head and its gradient less often.
_MEMORY, _MEMORY_ELSEWHERE = 64, 512
# Of these, the elements that a loss gets at once. What it makes of them is not in the budget, so they are few: what a
# core's cache holds several times, or what keeps another device busy for longer than it takes to tell it.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**16, 2**22

_Side = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states (N, D), a head (V, D) and its bias (V,), in one precision."""
_Teacher = Callable[[slice], tuple[Tensor, ...]]
"""What the teacher says of a slice of the tokens: its logits, or its k best."""
_Slope = Callable[..., tuple[Tensor, Tensor | None]]
"""From the student's logits (n, V), in float32 or float64, and from what the teacher says of the same n tokens: the sum
of the tokens' losses and, where gradients are recorded, its gradient with respect to the logits."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _fused_linear(student: _Side, teacher: _Teacher, slope: _Slope, rows: int) -> Tensor:
    """Return the mean of the tokens' losses, from the logits of as many ``rows`` at a time; zero without any token.

    A compiled step calls it as it is: its loop would be unrolled, anew for each number of tokens that count.
    """
    graded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student)
    loss: Tensor = _FusedLinear.apply(*student, teacher, slope, rows, graded)  # type: ignore[no-untyped-call]
    return loss


class _FusedLinear(torch.autograd.Function):
    """The loss, with its gradients computed along with it and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        teacher: _Teacher,
        slope: _Slope,
        rows: int,
        graded: bool,
    ) -> Tensor:
        wide = torch.promote_types(head.dtype, torch.float32)
        # Gradients are summed in the wide precision, and divided by the number of tokens at last: float16 has few
        # digits, or none, for quotients so small.
        of_hidden, of_head, of_bias = (
            torch.zeros_like(x, dtype=wide) if graded and x is not None and x.requires_grad else None
            for x in (hidden, head, bias)
        )
        total = hidden.new_zeros((), dtype=wide)
        at_once = max(1, (_AT_ONCE if hidden.device.type == "cpu" else _AT_ONCE_ELSEWHERE) // max(len(head), 1))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits, said = F.linear(hidden[chunk], head, bias), teacher(chunk)
            for first in range(0, len(logits), at_once):
                some = slice(first, first + at_once)
                theirs = (x[some].to(wide) if x.is_floating_point() else x[some] for x in said)
                with torch.set_grad_enabled(graded):
                    value, gradient = slope(logits[some].to(wide), *theirs)
                total += value.detach()
                if gradient is not None:
                    logits[some] = gradient  # in place: the logits are not needed any more
                if gradient is not None and of_bias is not None:
                    of_bias += gradient.sum(0)
            if of_hidden is not None:
                of_hidden[chunk] = logits @ head
            if of_head is not None and wide == head.dtype:
                of_head.addmm_(logits.mT, hidden[chunk])
            elif of_head is not None:
                of_head += logits.mT @ hidden[chunk]
            del logits, said  # before the next ones are made
        count = max(len(hidden), 1)
        for of_input in (of_hidden, of_head, of_bias):
            if of_input is not None:
                of_input /= count
        ctx.save_for_backward(of_hidden, of_head, of_bias)
        return total / count

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph; once_differentiable would let the loss itself pass as constant
            raise RuntimeError(
                "expected backward without create_graph: the gradients of a fused loss are computed along with its "
                "value and cannot be differentiated again; take the loss of the logits"
            )
        # Of the wide precision, which autograd takes back to that of the inputs.
        return *(None if x is None else of_loss * x for x in ctx.saved_tensors), *[None] * 4


def _by_autograd(loss: Callable[..., Tensor]) -> _Slope:
    """Return the sum and the gradient of a loss that averages over tokens."""

    def slope(logits: Tensor, *said: Tensor) -> tuple[Tensor, Tensor | None]:
        graded = torch.is_grad_enabled()
        logits = logits.detach().requires_grad_(graded)
        mean = loss(logits, *said)
        if mean.ndim:
            raise ValueError(f"expected the mean over tokens from the loss, a scalar, got {tuple(mean.shape)}")
        total = mean * len(logits)
        return total.detach(), torch.autograd.grad(total, logits)[0] if graded else None

    return slope


def _rows(chunk_size: int | None, memory: float | None, sides: list[_Side]) -> int:
    """Return how many tokens' logits, of one side or both, are held at a time."""
    if chunk_size is not None and memory is not None:
        raise ValueError(f"got chunk_size={chunk_size} and memory={memory}: pass one, they say the same")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"expected chunk_size >= 1, got {chunk_size}: the number of tokens whose logits are held")
    if memory is not None and not memory > 0:
        raise ValueError(f"expected memory > 0, got {memory}: the megabytes for the logits that are held at a time")
    if chunk_size is not None:
        return chunk_size
    if memory is None:
        memory = _MEMORY if sides[0][0].device.type == "cpu" else _MEMORY_ELSEWHERE
    bytes_a_token = sum(len(head) * head.element_size() for _, head, _ in sides)
    return max(1, int(memory * 2**20) // max(bytes_a_token, 1))


def _side(hidden: Tensor, head: Tensor, bias: Tensor | None, counted: Tensor | None, frozen: bool = False) -> _Side:
    """Return the tokens that count, with head and bias, in the precision of products: autocast's, or the highest."""
    if frozen:
        hidden, head, bias = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    hidden = hidden.flatten(0, -2) if counted is None else hidden.flatten(0, -2)[counted]
    device = hidden.device.type
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in (hidden, head, bias) if x is not None])
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)


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


def _check_learns_nothing(name: str, value: object) -> None:
    """Raise ValueError for a parameter that would get no gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"expected {name} to be a number, got a tensor that is learnt: hidden states, heads and biases only get "
            "gradients; take the loss of the logits"
        )
