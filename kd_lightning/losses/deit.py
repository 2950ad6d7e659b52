"""Training data-efficient image transformers (Touvron et al., ICML 2021), https://arxiv.org/abs/2012.12877."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, check_temperature, counted, padding
from kd_lightning.losses.kd import kd
from kd_lightning.outputs import Outputs, TopK, class_dim
from kd_lightning.tasks.batch import IGNORE_INDEX


def deit_soft(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, *, temperature: float | Tensor = 3.0
) -> Tensor:
    """T²·KL(softmax(z_t / T) ‖ softmax(z_s / T)) / (B·C), the second term of eq. 2 as the authors' code takes it.

    It divides by the number of classes too: :func:`~kd_lightning.losses.kd` is C times as large.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.

    Raises:
        ValueError: For a temperature ≤ 0 or unequal shapes.
    """
    classes = student_logits.shape[class_dim(student_logits)]
    return kd(student_logits, teacher_logits, target, temperature=temperature) / classes


def deit_hard(student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy with the teacher's prediction as the label: −log softmax(z_s)_argmax z_t (eq. 3, second term).

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.
    """
    check_same_shape(student_logits, teacher_logits)
    z_s, z_t = counted(target, student_logits, teacher_logits)
    return _cross_entropy(z_s, z_t.argmax(-1))


class DeiTSoft(LogitLoss):
    """:class:`KD` divided by the number of classes; see :func:`deit_soft`.

    Samples and pixels without label count, tokens that are ignored do not. The authors give it a head of its own, on a
    distillation token; here it reads the student's logits.

    Args:
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        standardize: See :class:`~kd_lightning.losses.LogitLoss`.
    """

    def __init__(self, temperature: float = 3.0, weight: float = 1.0, standardize: bool = False) -> None:
        super().__init__(weight, standardize)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        return deit_soft(*self.logits(student, teacher), tokens, temperature=self.temperature)


class DeiTHard(LogitLoss):
    """The teacher's hard labels: its corrections without its dark knowledge, hence the control beside :class:`KD`.

    Samples and pixels without label count, tokens that are ignored do not.
    """

    takes_top_k = True

    def forward(self, student: Outputs, teacher: Outputs | TopK, target: Tensor | None) -> Tensor:
        tokens = padding(student.logits, target)
        if isinstance(teacher, TopK) and not self.standardize:
            (z_s,), best = counted(tokens, student.logits), teacher.best().flatten()
            return _cross_entropy(z_s, best if tokens is None else best[tokens.flatten() != IGNORE_INDEX])
        return deit_hard(*self.logits(student, teacher), tokens)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) if len(labels) else 0.0 * logits.sum()
