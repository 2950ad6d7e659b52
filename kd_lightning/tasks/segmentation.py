"""A class for each pixel."""

from typing import Any

import torch
from torch import Tensor

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, TopK
from kd_lightning.tasks.batch import IGNORE_INDEX
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.of_counts import mean_iou


class Segmentation(Classification):
    """A class for each pixel: logits (B, C, H, W), targets (B, H, W).

    All losses on logits and features go on it, and read a pixel as they read a sample. Units are images: what a student
    gets wrong in one pixel it gets wrong in the next.

    The headline is the mean over classes of intersection over union (mIoU; Everingham et al., 2010), of the counts of
    all images. A class that no labelled pixel has and no answer gives is left out.

    Args:
        ignore_index: What a target holds at a pixel without label, such as 255 in Pascal VOC and Cityscapes; it becomes
            -100, which also means so.
        units: What has a class at each pixel, plural, as sentences say it.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, units: str = "images") -> None:
        super().__init__(units=units)
        self.ignore_index = ignore_index
        self.headline = Headline(name="mIoU", key="miou", units=units, of_mean=mean_iou)

    def target_of(self, target: Any) -> Any:
        """Return classes of any integer type as int64, with -100 where there is no label; anything else as it is."""
        target = super().target_of(target)
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or self.ignore_index == IGNORE_INDEX:
            return target
        return target.masked_fill(target == self.ignore_index, IGNORE_INDEX)

    def answers(self, outputs: AnyOutputs) -> Tensor:
        """Return the most likely class of each pixel: (n, H, W), as bytes where there are no more than 256 classes."""
        return outputs.best().to(torch.uint8 if _classes(outputs) <= 256 else torch.int32)

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        """Count for each labelled image and class the pixels of intersection and union: (n, C, 2)."""
        classes, labels, labelled = _classes(outputs), self.labels(target), self.has_label(target)
        labels, answers = labels[labelled].flatten(1), self.answers(outputs)[labelled].flatten(1).long()
        known = labels != IGNORE_INDEX
        image = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        cell = (image * classes + labels) * classes + answers
        confusion = cell[known].bincount(minlength=len(labels) * classes**2).view(-1, classes, classes)
        intersection = confusion.diagonal(dim1=1, dim2=2)
        return torch.stack([intersection, confusion.sum(1) + confusion.sum(2) - intersection], -1).float()

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the share of an image's pixels at which both find the same class most likely: (n,)."""
        return torch.eq(student, teacher).flatten(1).float().mean(1)

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return the mIoU of the most frequent class at each pixel; None for one class alone."""
        labels = self.labels(target)
        counts = labels[labels != IGNORE_INDEX].bincount()
        classes = int((counts > 0).sum())
        return float(counts.max() / counts.sum()) / classes if classes > 1 else None

    def check(self, target: Any, logits: Tensor) -> None:
        if logits.ndim != 4:
            raise ValueError(
                f"the logits are of shape {tuple(logits.shape)}, expected a class at each pixel, (N, C, H, W): one "
                "class for each image is task=Classification()"
            )
        if isinstance(target, Tensor) and not target.is_floating_point() and target.shape[1:] != logits.shape[2:]:
            remedy = "give maps of the logits' size, or let the network enlarge its logits to that of the maps"
            if target.ndim == 4 and target.shape[1] == 1:
                remedy = "call target.squeeze(1)"
            raise ValueError(
                f"the target is of shape {tuple(target.shape)}, expected a class for each pixel of logits "
                f"{tuple(logits.shape)}, (N, {logits.shape[2]}, {logits.shape[3]}): {remedy}"
            )
        try:
            super().check(target, logits)
        except ValueError as error:
            if "is out of range" not in str(error):
                raise
            raise ValueError(f"{error}; ignore_index={self.ignore_index} says which pixels have no label") from error


def _classes(outputs: AnyOutputs) -> int:
    """Return how many classes there are, or may be where only the best are known: the same number in each batch."""
    return max(256, int(outputs.indices.max()) + 1) if isinstance(outputs, TopK) else outputs.logits.shape[1]
