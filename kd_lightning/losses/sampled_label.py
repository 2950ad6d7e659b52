"""Labels drawn from the teacher: what a text written by it would say, and no more."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.losses.base import DistillationLoss, check_same_shape, padding, rows
from kd_lightning.outputs import Outputs
from kd_lightning.tasks.batch import IGNORE_INDEX

_PLACES = 2**20


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
    labels = _drawn(rows(teacher_logits.detach()), uniform.flatten())
    if target is not None:
        labels = labels.masked_fill(target.flatten() == IGNORE_INDEX, IGNORE_INDEX)
    z_s, kept = rows(student_logits), labels != IGNORE_INDEX
    return F.cross_entropy(z_s[kept], labels[kept]) if bool(kept.any()) else 0.0 * student_logits.sum()


class SampledLabel(DistillationLoss):
    """A label drawn from the teacher for each sample, token or pixel: the fair control of a language model.

    The most likely token would take away what a text has of variety. Each place of the data set keeps its label through
    all epochs, as in a text that was written once; see :func:`sampled_label`.

    Args:
        weight: Factor of the term.
        seed: Of the draw.
    """

    needs_sample_ids = True

    def __init__(self, weight: float = 1.0, seed: int = 0) -> None:
        super().__init__(weight)
        self.seed = seed

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        assert student.samples is not None
        labels = rows(student.logits)
        places = len(labels) // len(student.samples.ids)
        uniform = hashed_uniform(self.seed, student.samples.ids, places)
        return sampled_label(student.logits, teacher.logits, uniform, padding(student.logits, target))


def hashed_uniform(seed: int, ids: Tensor, places: int) -> Tensor:
    """Return a number in [0, 1) for each place of each sample, a function of (seed, id, place): (B, places).

    The same in whatever batch, epoch, process and device: a counter-based generator, the finaliser of MurmurHash3's
    64-bit variant in two rounds.
    """
    counter = ids[:, None].long() * _PLACES + torch.arange(places, device=ids.device)
    x = counter + (seed + 1) * 0x1E3779B97F4A7C15
    for _ in range(2):
        x = (x ^ _shifted(x, 33)) * -0x00AE502812AA7333
        x = (x ^ _shifted(x, 33)) * -0x3B314601E57A13AD
        x = x ^ _shifted(x, 33)
    return _shifted(x, 40).to(torch.float32) / 2**24


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as if int64 had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    cumulated = torch.softmax(logits.float(), -1).cumsum(-1)
    last = cumulated[:, -1:]  # 1 but for rounding
    return (
        torch.searchsorted(cumulated, uniform[:, None].to(cumulated) * last, right=True)
        .squeeze(1)
        .clamp_max(logits.shape[-1] - 1)
    )
