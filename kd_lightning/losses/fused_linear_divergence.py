"""Any loss of two models' logits from their last hidden states; see :mod:`kd_lightning.losses.fused_linear`."""

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.fused_linear import (
    _by_autograd,
    _check_learns_nothing,
    _check_side,
    _fused_linear,
    _rows,
    _side,
    _Slope,
)


def fused_linear_divergence(
    divergence: Callable[[Tensor, Tensor], Tensor],
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    target: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    memory: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """``divergence`` of the student's and the teacher's logits h Wᵀ + b, without holding those of all tokens.

    Args:
        divergence: Takes student and teacher logits (n, V) and returns their mean over tokens, which it does not
            compare with one another: ``reverse_kl``, ``symmetric_kl``, ``skewed_forward_kl``, ``skewed_reverse_kl``,
            ``jensen_shannon``, ``total_variation``; ``functools.partial(jensen_shannon, beta=0.3, temperature=2.0)``;
            a function of your own. For ``forward_kl``, :func:`fused_linear_kl` takes two thirds of the time.
        student_hidden: (N, D) or (B, S, D), the last hidden states, as the head takes them.
        student_head: (V, D), the head's weight; it may be the table of embeddings.
        teacher_hidden: (N, E) or (B, S, E).
        teacher_head: (V, E).
        target: (N,) or (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where
            none does.
        chunk_size: How many tokens' logits are held at a time; as many as ``memory`` allows by default.
        memory: MB (2²⁰ bytes) for the logits of both sides that are held at a time; 64 on a CPU, 512 elsewhere.
        student_bias: (V,).
        teacher_bias: (V,).
        ignore_index: See ``target``.

    The gradients, of the size of the student's hidden states and head, are computed along with the value and kept in
    float32: it cannot be differentiated twice, and nothing but student_hidden, student_head and student_bias gets a
    gradient. The loss is in float32, too, where the products are in half precision. ``torch.compile`` runs it as it is,
    between two graphs; with ``fullgraph=True`` it refuses.

    Raises:
        ValueError: For a chunk_size < 1, a memory ≤ 0, shapes that do not belong together, an argument of the
            divergence that is learnt, and what the divergence itself refuses.

    Example:
        >>> import functools, torch
        >>> from kd_lightning.losses import jensen_shannon
        >>> hidden, head, teacher = torch.randn(2, 6, 3), torch.randn(50, 3), torch.randn(2, 6, 8)
        >>> teacher_head = torch.randn(50, 8)
        >>> softened = functools.partial(jensen_shannon, beta=0.3, temperature=2.0)
        >>> fused = fused_linear_divergence(softened, hidden, head, teacher, teacher_head, chunk_size=4)
        >>> torch.allclose(fused, softened(hidden @ head.T, teacher @ teacher_head.T), rtol=1e-4)
        True
    """
    if isinstance(divergence, functools.partial):
        for name, value in divergence.keywords.items():
            _check_learns_nothing(name, value)
    student, teacher = (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias)
    return _of_two_heads(_by_autograd(divergence), student, teacher, target, chunk_size, memory, ignore_index)


def _of_two_heads(
    slope: _Slope,
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor | None,
    chunk_size: int | None,
    memory: float | None,
    ignore_index: int,
) -> Tensor:
    _check_side("student", *student)
    _check_side("teacher", *teacher)
    tokens = student[0].shape[:-1]
    if teacher[0].shape[:-1] != tokens or (target is not None and target.shape != tokens):
        raise ValueError(
            f"student_hidden {tuple(student[0].shape)}, teacher_hidden {tuple(teacher[0].shape)} and target "
            f"{None if target is None else tuple(target.shape)} differ in their tokens: cut all to the same"
        )
    if len(student[1]) != len(teacher[1]):
        raise ValueError(
            f"student_head {tuple(student[1].shape)} and teacher_head {tuple(teacher[1].shape)} differ in their "
            "vocabulary, expected the same: slice the heads to the tokens that both have"
        )
    counted = None if target is None else target.flatten() != ignore_index
    ours, (hidden, head, bias) = _side(*student, counted), _side(*teacher, counted, frozen=True)

    def said(chunk: slice) -> tuple[Tensor, ...]:
        return (F.linear(hidden[chunk], head, bias),)

    rows = _rows(chunk_size, memory, [ours, (hidden, head, bias)])
    loss: Tensor = _fused_linear(ours, said, slope, rows)
    return loss
