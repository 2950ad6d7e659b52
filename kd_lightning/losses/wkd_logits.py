"""WKD-L of "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation".

Lv et al., NeurIPS 2024, https://arxiv.org/abs/2412.08139.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import (
    LogitLoss,
    check_not_negative,
    check_same_shape,
    check_temperature,
    labelled,
    nothing,
)
from kd_lightning.outputs import Outputs, class_dim, find_layer

_FARTHEST = 60.0  # exp(-60) is 1e-26: float32 goes on to 1e-38, which leaves 12 digits to the scalings


def wkd_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    cost: Tensor,
    temperature: float = 2.0,
    gamma: float = 1.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    """−p_t,y log p_s,y + γ·Σ_ij π_ij c_ij, averaged over the samples that have a label.

    The first term is at T = 1. π moves the student's distribution over the classes other than y to the teacher's, both
    softmax(z / T) without class y: it is what so many iterations of Sinkhorn give for the entropic transport problem,
    with the student's marginal exact. Neither a factor T², nor zero where the student equals the teacher: entropy
    spreads π beyond the diagonal.

    The scalings are kept as logarithms. The authors' code adds 1e-8 to their denominators instead, so that its π loses
    some mass: it differs from this by some 5e-5 of the value on plain inputs.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W).
        target: One label for each, -100 where there is none; zero, with a gradient of zero, where none has one.
        cost: (C, C), c_ij ≥ 0 from the student's class i to the teacher's class j. Memory is that of one (C, C) matrix
            and of some (B, C) ones for each iteration.

    Raises:
        ValueError: For numbers out of their ranges, a cost of another shape, a negative one, one that exceeds 60 times
            the regularization, and a target of probabilities.
    """
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits)
    cost = cost.detach().to(student_logits.dtype)
    _check_transport(cost, student_logits.shape[class_dim(student_logits)], regularization, iterations)
    labels, z_s, z_t = labelled(target, student_logits, teacher_logits.detach())
    if not len(labels):
        return 0.0 * student_logits.sum()
    right = labels[:, None]
    hits = -z_t.softmax(-1).gather(1, right) * z_s.log_softmax(-1).gather(1, right)
    others_s, others_t = ((z / temperature).scatter(1, right, -math.inf).log_softmax(-1) for z in (z_s, z_t))
    return hits.mean() + gamma * _transport(others_s, others_t, cost, regularization, iterations).mean()


class WKDLogits(LogitLoss):
    """Transport of the student's probabilities to the teacher's, between near classes at a lower cost than far ones.

    The paper's cost is 1 − exp(−κ(1 − CKA)), with the linear CKA of the teacher's features of two classes' training
    samples, computed beforehand. Pass such a matrix as ``cost``, or name the ``teacher_classifier``: the cosine of the
    two classes' rows of its weight then takes the CKA's place, as in the option ``fc`` of the authors' code. That
    needs no pass over the training set, and class weights say which classes the teacher takes for similar; but a
    cosine can be negative, so that costs reach 1 − exp(−2κ).

    Args:
        teacher_classifier: Name of the teacher's last layer, which has a weight of one row a class.
        cost: (C, C), c_ij ≥ 0, in place of ``teacher_classifier``.
        temperature: T > 0, of both distributions over the other classes.
        gamma: γ ≥ 0, of the transport; the authors' 600 on CIFAR-100.
        regularization: Of the transport's entropy, > 0. Larger costs than 60 times this are refused.
        iterations: Of Sinkhorn, at least 1.
        sharpness: κ > 0, of the cost that is read from the teacher.
        weight: Factor of the whole term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.

    Raises:
        ValueError: For numbers out of their ranges, and unless one of ``teacher_classifier`` and ``cost`` is given; in
            :meth:`attach`, for an unknown layer or one without such a weight.
    """

    needs_labels = True
    cost: Tensor

    def __init__(
        self,
        teacher_classifier: str | None = None,
        cost: Tensor | Sequence[Sequence[float]] | None = None,
        temperature: float = 2.0,
        gamma: float = 1.0,
        regularization: float = 0.05,
        iterations: int = 10,
        sharpness: float = 1.0,
        weight: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(weight, standardize)
        if (teacher_classifier is None) == (cost is None):
            got = "neither" if cost is None else "both"
            raise ValueError(f"expected teacher_classifier or cost, got {got}: name the teacher's last layer")
        check_temperature(temperature)
        check_not_negative(gamma=gamma)
        if not sharpness > 0:
            raise ValueError(f"expected sharpness > 0, got {sharpness}: the authors take 1")
        given = torch.zeros(0, 0) if cost is None else torch.as_tensor(cost)
        _check_transport(given, len(given), regularization, iterations)
        self.teacher_classifier = teacher_classifier
        self.needs_teacher_network = teacher_classifier is not None
        self.temperature, self.gamma, self.sharpness = temperature, gamma, sharpness
        self.regularization, self.iterations = regularization, iterations
        self.register_buffer("cost", given, persistent=False)  # it comes from the arguments or the teacher again

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if self.teacher_classifier is None:
            return
        assert teacher is not None
        weight = getattr(find_layer(teacher, self.teacher_classifier), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            raise ValueError(
                f"expected a weight of one row a class in the teacher's layer {self.teacher_classifier!r}, got "
                f"{'none' if weight is None else tuple(weight.shape)}: name its last linear layer, or pass cost"
            )
        self.cost = _class_cost(weight.detach().flatten(1), self.sharpness).to(self.cost)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if target is None:
            return nothing(student)
        return wkd_logits(
            *self.logits(student, teacher),
            target,
            cost=self.cost,
            temperature=self.temperature,
            gamma=self.gamma,
            regularization=self.regularization,
            iterations=self.iterations,
        )


def _transport(log_s: Tensor, log_t: Tensor, cost: Tensor, regularization: float, iterations: int) -> Tensor:
    """Return each row's Σ_ij π_ij c_ij; a class of probability 0 (log -inf) takes no part."""
    # One kernel serves all samples: that a sample's class y is left out is in its scalings, which are 0 there.
    kernel = (-cost / regularization).exp()
    log_u = torch.zeros_like(log_s).masked_fill(log_s == -math.inf, -math.inf)
    for _ in range(iterations):
        log_v = log_t - _log_matmul(log_u, kernel)
        log_u = log_s - _log_matmul(log_v, kernel.T)
    # With the last u in it, π is p_s times the shares that K and v give to the teacher's classes.
    v = (log_v - log_v.amax(-1, keepdim=True).detach()).exp()
    return (log_s.exp() * (v @ (kernel * cost).T) / (v @ kernel.T)).sum(-1)


def _log_matmul(log_x: Tensor, matrix: Tensor) -> Tensor:
    """Return log(exp(log_x) @ matrix)."""
    largest = log_x.amax(-1, keepdim=True).detach()
    return largest + ((log_x - largest).exp() @ matrix).log()


def _class_cost(weight: Tensor, sharpness: float) -> Tensor:
    directions = F.normalize(weight.float(), dim=-1)
    distance = (1 - directions @ directions.T).clamp_min(0).fill_diagonal_(0)
    return 1 - (-sharpness * distance).exp()


def _check_transport(cost: Tensor, classes: int, regularization: float, iterations: int) -> None:
    if not regularization > 0 or iterations < 1:
        raise ValueError(
            f"expected regularization > 0 and iterations >= 1, got {regularization} and {iterations}: the authors take "
            "0.05 and 10"
        )
    if cost.shape != (classes, classes):
        raise ValueError(
            f"expected a cost of shape {(classes, classes)}, one row and one column a class, got {tuple(cost.shape)}: "
            "name the teacher's last layer, or give the cost of these classes"
        )
    low, high = (cost.min().item(), cost.max().item()) if cost.numel() else (0.0, 0.0)
    if not 0 <= low <= high <= _FARTHEST * regularization:
        raise ValueError(
            f"expected costs from 0 to {_FARTHEST:g} times the regularization {regularization}, got {low:g} to "
            f"{high:g}: scale them, or raise the regularization"
        )
