"""Labels drawn from the teacher: what a text written by it would say, and no more."""

import torch.nn.functional as F
from torch import Tensor

from kd_lightning.draws import drawn, hashed_uniform
from kd_lightning.losses.base import DistillationLoss, check_same_shape, padding, rows
from kd_lightning.outputs import Outputs, TopK
from kd_lightning.tasks.batch import IGNORE_INDEX


def sampled_label(
    student_logits: Tensor, teacher_logits: Tensor, uniform: Tensor, target: Tensor | None = None
) -> Tensor:
    """Cross-entropy −log softmax(z_s)_y with a label y drawn from softmax(z_t).

    For a language model each label is a token of a text that the teacher might have written: word-level distillation
    from samples, the hard counterpart of Kim & Rush (EMNLP 2016, https://arxiv.org/abs/1606.07947, section 3.1). Over
    many draws its gradient is that of KL(p_t ‖ p_s); with one draw for each place it is what hard labels can tell.

    Shape:
        student_logits, teacher_logits: (B, C), (B, S, V) or (B, C, H, W), averaged over samples, tokens or pixels.
        uniform: Of those, numbers in [0, 1) that draw the labels: y is the first class whose cumulated probability
            exceeds the number.
        target: Of those, -100 where one does not count; zero, with a gradient of zero, where none does.
    """
    check_same_shape(student_logits, teacher_logits)
    return _cross_entropy(student_logits, drawn(rows(teacher_logits.detach()), uniform.flatten()), target)


def _cross_entropy(student_logits: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
    if target is not None:
        labels = labels.masked_fill(target.flatten() == IGNORE_INDEX, IGNORE_INDEX)
    z_s, kept = rows(student_logits), labels != IGNORE_INDEX
    return F.cross_entropy(z_s[kept], labels[kept]) if bool(kept.any()) else 0.0 * student_logits.sum()


class SampledLabel(DistillationLoss):
    """A label drawn from the teacher for each sample, token or pixel: the fair control of a language model.

    The most likely token would take away what a text has of variety. Each place of the data set keeps its label through
    all epochs, as in a text that was written once; see :func:`sampled_label`. Where only the teacher's k best classes
    are known, it is one of these (top-k sampling).

    Args:
        weight: Factor of the term.
        seed: Of the draw.
    """

    needs_sample_ids = True
    takes_top_k = True

    def __init__(self, weight: float = 1.0, seed: int = 0) -> None:
        super().__init__(weight)
        self.seed = seed

    def forward(self, student: Outputs, teacher: Outputs | TopK, target: Tensor | None) -> Tensor:
        assert student.samples is not None
        labels = rows(student.logits)
        places = len(labels) // len(student.samples.ids)
        uniform = hashed_uniform(self.seed, student.samples.ids, places)
        if isinstance(teacher, TopK):
            of_best = drawn(teacher.log_probs.flatten(0, -2), uniform.flatten())
            chosen = teacher.indices.flatten(0, -2).gather(1, of_best[:, None]).squeeze(1)
            return _cross_entropy(student.logits, chosen, padding(student.logits, target))
        return sampled_label(student.logits, teacher.logits, uniform, padding(student.logits, target))
