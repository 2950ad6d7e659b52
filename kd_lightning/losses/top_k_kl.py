"""Distillation from the k classes that a teacher finds most likely: all that an API tells, or that is stored.

What is left out biases the student (Anshumann et al., Sparse Logit Sampling, ACL 2025), https://arxiv.org/abs/2503.16870;
:func:`missing_mass` says how much that is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, check_temperature, counted, padding
from kd_lightning.losses.token_divergence import kl_divergence, log_softmax
from kd_lightning.outputs import Outputs, TopK, class_dim, classes_last


def top_k_kl(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    target: Tensor | None = None,
    *,
    tail: bool = True,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """T²·KL(q_t ‖ q_s) over the teacher's k best classes, averaged over the samples or tokens that count.

    With ``tail``, q has a further outcome "any other class" of probability 1 − Σ_k p; without, it is p renormalised
    over the k, and what the student gives to other classes is free. q is taken at T = 1, as APIs give it, and then
    softened: q^(1/T), renormalised. With k = C this is :func:`~kd_lightning.losses.forward_kl`.

    Shape:
        student_logits: (B, S, V); or (B, C), (B, C, H, W).
        indices, log_probs: (B, S, k); or (B, k), (B, H, W, k): different classes, and the teacher's log p of them at
            T = 1, in any order; −∞ fills up where there are fewer, with any class, such as -1.
        target: (B, S), ``ignore_index`` where a token does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For a temperature ≤ 0, or shapes that do not belong together.

    Example:
        >>> student = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> top_k_kl(student, torch.tensor([[0, 1]]), student.log_softmax(-1)[:, :2]).abs().item() < 1e-6
        True
    """
    check_temperature(temperature)
    samples, classes = classes_last(student_logits).shape[:-1], classes_last(student_logits).shape[-1]
    if not (indices.shape == log_probs.shape and indices.shape[:-1] == samples and 0 < indices.shape[-1] <= classes):
        raise ValueError(
            f"expected indices and log_probs ({', '.join(map(str, (*samples, 'k')))}) with k from 1 to {classes} for "
            f"student logits {tuple(student_logits.shape)}, got {tuple(indices.shape)} and {tuple(log_probs.shape)}"
        )
    dim = class_dim(student_logits)
    of_teacher = indices.movedim(-1, dim), log_probs.detach().movedim(-1, dim)
    z_s, best, log_t = counted(target, student_logits, *of_teacher, ignore_index=ignore_index)
    log_s = log_softmax(z_s, 1.0)
    least = torch.finfo(log_s.dtype).min
    # What fills up is no outcome, whatever its class, which is one of the others: it points to the best one instead.
    fills = log_t == -math.inf
    best = torch.where(fills, best.gather(-1, log_t.argmax(-1, keepdim=True)), best)
    student, teacher = log_s.gather(-1, best).masked_fill(fills, least), log_t.to(log_s.dtype)
    if tail and best.shape[-1] < classes:
        # The student's from the sum over the others, which has all its digits where 1 − Σ_k p has none.
        other = log_s.scatter(-1, best, least).logsumexp(-1, keepdim=True)
        student = torch.cat((student, other), -1)
        teacher = torch.cat((teacher, _log1mexp(teacher.logsumexp(-1, keepdim=True))), -1)
    return temperature**2 * kl_divergence(log_softmax(teacher, temperature), log_softmax(student, temperature))


def missing_mass(log_probs: Tensor) -> Tensor:
    """1 − Σ_k p: the probability of all classes that are not among the teacher's k best.

    Shape:
        log_probs: (…, k), at T = 1. The result is (…).

    Example:
        >>> round(missing_mass(torch.tensor([0.5, 0.25]).log()).item(), 6)
        0.25
    """
    return -torch.expm1(log_probs.logsumexp(-1).clamp_max(0))


class TopKKL(LogitLoss):
    """Only the teacher's k best classes and their probabilities, as from an API; see :func:`top_k_kl`.

    It takes them from the teacher's logits, or from the best classes where no more is known
    (:class:`~kd_lightning.outputs.TopK`): those that go beyond k are part of the tail then. Ignored tokens do not
    count, images without label do.

    Args:
        k: How many classes; of a teacher that tells fewer, all of these.
        tail: Whether all others are one further outcome; else the k best are renormalised.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.

    Raises:
        ValueError: For k < 1; in ``forward``, for more than there are classes, and for a teacher of other classes.
    """

    takes_top_k = True

    def __init__(
        self, k: int, tail: bool = True, temperature: float = 1.0, weight: float = 1.0, standardize: bool = False
    ) -> None:
        super().__init__(weight, standardize)
        check_temperature(temperature)
        if k < 1:
            raise ValueError(f"expected k >= 1, got {k}: the number of the teacher's best classes")
        self.k = k
        self.tail = tail
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs | TopK, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        if isinstance(teacher, TopK) and not self.standardize:
            kept = teacher.log_probs.topk(min(self.k, teacher.k), -1)
            chosen = teacher.indices.gather(-1, kept.indices)
            return top_k_kl(student.logits, chosen, kept.values, tokens, tail=self.tail, temperature=self.temperature)
        z_s, z_t = self.logits(student, teacher)
        check_same_shape(z_s, z_t)  # the formula sees the best classes' numbers only
        log_t = F.log_softmax(classes_last(z_t), -1)
        if self.k > log_t.shape[-1]:
            raise ValueError(f"expected k up to the {log_t.shape[-1]} classes, got {self.k}: take forward_kl for all")
        best = log_t.topk(self.k, -1)
        return top_k_kl(z_s, best.indices, best.values, tokens, tail=self.tail, temperature=self.temperature)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − exp x) for x ≤ 0, without loss of digits at either end; −∞ for what rounding left above 0."""
    x = x.clamp_max(0)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
