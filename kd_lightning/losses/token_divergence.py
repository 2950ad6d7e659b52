"""What the divergences between two networks' softened distributions are made of, token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, check_temperature, counted


class TokenLoss(LogitLoss):
    """A divergence between softened distributions; ignored tokens do not count, images without label do.

    Args:
        temperature: T > 0, of both sides.
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def __init__(self, temperature: float = 1.0, weight: float = 1.0, standardize: bool = False) -> None:
        super().__init__(weight, standardize)
        check_temperature(temperature)
        self.temperature = temperature


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return log softmax(z / T) over the last dimension, finite everywhere."""
    # −∞ becomes the least finite number: neither ∞ − ∞ nor 0·∞ comes up after it, and exp of it is 0 all the same.
    return F.log_softmax(logits / temperature, -1).clamp_min(torch.finfo(logits.dtype).min)


def log_probabilities(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(z / T) of the tokens that count, (N, V) each: the student's, and the teacher's detached."""
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    z_s, z_t = counted(target, student_logits, teacher_logits.detach(), ignore_index=ignore_index)
    return log_softmax(z_s, temperature), log_softmax(z_t, temperature)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return Σ p·(log p − log q), averaged over the rows; zero without any."""
    return (log_p.exp() * (log_p - log_q)).sum() / max(len(log_p), 1)
