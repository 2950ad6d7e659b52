"""Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024), https://arxiv.org/abs/2403.01427."""

from torch import Tensor

from kd_lightning.outputs import class_dim


def standardize_logits(logits: Tensor) -> Tensor:
    """(z − mean z) / (1e-7 + std z), both over the classes; std with C − 1 in the denominator, as in the authors' code.

    The ``standardize`` option of the losses on logits: the student need not reproduce the size of the teacher's logits.
    The authors weigh KD by 9 at T = 2 then (beside 0.1 hard label), and take 9 times DKD's α and β.

    Shape: (B, C), (B, S, V) or (B, C, H, W); unchanged. Constant logits become zero.
    """
    classes = class_dim(logits)
    centred = logits - logits.mean(classes, keepdim=True)
    # Once more: what the first mean lost in rounding would be divided by 1e-7 where the logits are constant.
    centred = centred - centred.mean(classes, keepdim=True)
    return centred / (1e-7 + logits.std(classes, keepdim=True))
