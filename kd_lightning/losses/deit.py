"""Training data-efficient image transformers (Touvron et al., ICML 2021), https://arxiv.org/abs/2012.12877."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import LogitLoss, check_same_shape, rows
from kd_lightning.outputs import Outputs


def deit_hard(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's prediction as the label: −log softmax(z_s)_argmax z_t (eq. 3, second term).

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
    """
    check_same_shape(student_logits, teacher_logits)
    return F.cross_entropy(rows(student_logits), rows(teacher_logits).argmax(-1))


class DeiTHard(LogitLoss):
    """The teacher's hard labels: its corrections without its dark knowledge, hence the control beside :class:`KD`."""

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        return deit_hard(*self.logits(student, teacher))
