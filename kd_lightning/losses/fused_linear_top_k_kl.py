"""The teacher's k best classes against the last hidden states; see :mod:`kd_lightning.losses.fused_linear`."""

from torch import Tensor

from kd_lightning.losses.base import check_temperature
from kd_lightning.losses.fused_linear import (
    _by_autograd,
    _check_learns_nothing,
    _check_side,
    _fused_linear,
    _rows,
    _side,
)
from kd_lightning.losses.top_k_kl import top_k_kl


def fused_linear_top_k_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    target: Tensor | None = None,
    *,
    tail: bool = True,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory: float | None = None,
    student_bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """:func:`~kd_lightning.losses.top_k_kl` of the student's logits h Wᵀ + b, without holding those of all tokens.

    ``indices, log_probs`` are those of a :class:`~kd_lightning.outputs.TopK`. With k = 1 and ``log_probs`` of
    zero it is the cross-entropy with labels. For the other arguments see
    :func:`~kd_lightning.losses.fused_linear_divergence`.

    Shape:
        student_hidden: (N, D) or (B, S, D). student_head: (V, D). student_bias: (V,).
        indices, log_probs: (N, k) or (B, S, k): different classes, and the teacher's log p of them at T = 1, in any
            order; −∞ fills up where there are fewer.
        target: (N,) or (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where
            none does.

    Raises:
        ValueError: For a temperature ≤ 0 or one that is learnt, a chunk_size < 1, a memory ≤ 0, or shapes that do not
            belong together.

    Example:
        >>> import torch
        >>> hidden, head, labels = torch.randn(6, 3), torch.randn(50, 3), torch.randint(50, (6,))
        >>> fused = fused_linear_top_k_kl(hidden, head, labels[:, None], torch.zeros(6, 1))
        >>> torch.allclose(fused, torch.nn.functional.cross_entropy(hidden @ head.T, labels))
        True
    """
    check_temperature(temperature)
    _check_learns_nothing("temperature", temperature)
    _check_side("student", student_hidden, student_head, student_bias)
    tokens = student_hidden.shape[:-1]
    if not (indices.shape == log_probs.shape and indices.shape[:-1] == tokens and indices.shape[-1] > 0):
        raise ValueError(
            f"expected indices and log_probs ({', '.join(map(str, (*tokens, 'k')))}) with k from 1 for student_hidden "
            f"{tuple(student_hidden.shape)}, got {tuple(indices.shape)} and {tuple(log_probs.shape)}"
        )
    if indices.shape[-1] > len(student_head):
        raise ValueError(f"expected k up to the {len(student_head)} classes of student_head, got {indices.shape[-1]}")
    if target is not None and target.shape != tokens:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and target {tuple(target.shape)} differ in their tokens: "
            "cut both to the same"
        )
    counted = None if target is None else target.flatten() != ignore_index
    best, log_t = (x.flatten(0, -2) if counted is None else x.flatten(0, -2)[counted] for x in (indices, log_probs))
    student = _side(student_hidden, student_head, student_bias, counted)

    def loss(logits: Tensor, best: Tensor, log_t: Tensor) -> Tensor:
        return top_k_kl(logits, best, log_t, tail=tail, temperature=temperature)

    def said(chunk: slice) -> tuple[Tensor, ...]:
        return best[chunk], log_t[chunk]

    fused: Tensor = _fused_linear(student, said, _by_autograd(loss), _rows(chunk_size, memory, [student]))
    return fused
