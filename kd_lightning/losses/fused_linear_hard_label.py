"""Cross-entropy with labels from the last hidden states; see :mod:`kd_lightning.losses.fused_linear`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.fused_linear import _check_side, _fused_linear, _rows, _side
from kd_lightning.losses.fused_loss import FusedLoss
from kd_lightning.outputs import Outputs


def fused_linear_hard_label(
    student_hidden: Tensor,
    student_head: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    memory: float | None = None,
    student_bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """:func:`~kd_lightning.losses.hard_label` of the student's logits h Wᵀ + b, without those of all tokens.

    For the other arguments see :func:`~kd_lightning.losses.fused_linear_divergence`.

    Shape:
        student_hidden: (N, D) or (B, S, D). student_head: (V, D). student_bias: (V,).
        target: int64 (N,) or (B, S), ``ignore_index`` where there is no label; zero, with a gradient of zero, where
            none has one.

    Raises:
        ValueError: For probabilities as target, a label that the head does not have, a chunk_size < 1, a memory ≤ 0,
            or shapes that do not belong together.

    Example:
        >>> import torch
        >>> hidden, head, labels = torch.randn(6, 3), torch.randn(50, 3), torch.randint(50, (6,))
        >>> fused = fused_linear_hard_label(hidden, head, labels, chunk_size=4)
        >>> torch.allclose(fused, torch.nn.functional.cross_entropy(hidden @ head.T, labels))
        True
    """
    _check_side("student", student_hidden, student_head, student_bias)
    if target.is_floating_point():
        raise ValueError(
            "expected class indices as target, got probabilities (mixup?): those are as large as the logits of all "
            "tokens; take hard_label"
        )
    if target.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and target {tuple(target.shape)} differ in their tokens: "
            "cut both to the same"
        )
    counted = target.flatten() != ignore_index
    labels = target.flatten()[counted][:, None]
    student = _side(student_hidden, student_head, student_bias, counted)

    def slope(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        log_p = F.log_softmax(logits, -1)
        total = -(1 - label_smoothing) * log_p.gather(-1, label).sum()
        if label_smoothing:
            total = total - label_smoothing * log_p.mean(-1).sum()
        if not torch.is_grad_enabled():
            return total, None
        gradient = log_p.exp_().sub_(label_smoothing / log_p.shape[-1])
        return total, gradient.scatter_add_(-1, label, gradient.new_full(label.shape, label_smoothing - 1))

    def said(chunk: slice) -> tuple[Tensor, ...]:
        return (labels[chunk],)

    fused: Tensor = _fused_linear(student, said, slope, _rows(chunk_size, memory, [student]))
    return fused


class FusedHardLabel(FusedLoss):
    """Cross-entropy with the labels, without logits of all tokens; see :class:`~kd_lightning.losses.HardLabel`.

    Args:
        student_layer: Name of the layer whose output the head takes, see
            :class:`~kd_lightning.losses.fused_loss.FusedLoss`.
        student_head: Name of the head.
        weight: Factor of the term.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        memory: MB for the logits that are held at a time; 64 on a CPU, 512 elsewhere unless given.

    Raises:
        ValueError: For numbers out of their ranges; in ``forward``, for probabilities as target.

    Example:
        >>> objective = {"hard_label": FusedHardLabel("norm", "head", weight=0.1)}
    """

    needs_labels = True
    needs_teacher = False

    def __init__(
        self,
        student_layer: str,
        student_head: str,
        weight: float = 1.0,
        label_smoothing: float = 0.0,
        memory: float | None = None,
    ) -> None:
        super().__init__(student_layer, student_head, weight=weight, memory=memory)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"expected label_smoothing in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        hidden, head, bias = self.student_side(student)
        if target is None:
            target = torch.full(hidden.shape[:-1], -100, device=hidden.device)
        smoothing = self.label_smoothing
        return fused_linear_hard_label(
            hidden, head, target, label_smoothing=smoothing, memory=self.memory, student_bias=bias
        )
