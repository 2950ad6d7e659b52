"""Class Attention Transfer Based Knowledge Distillation (Guo et al., CVPR 2023), https://arxiv.org/abs/2304.12777."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss
from kd_lightning.losses.features import check_maps
from kd_lightning.outputs import Outputs, find_layer


def class_attention_transfer(
    student: Tensor, teacher: Tensor, *, resolution: int = 2, normalize: bool = True
) -> Tensor:
    """Mean squared difference of the class activation maps, average-pooled to ``resolution``².

    Averaged over samples, classes and places. With ``normalize``, each class's pooled map is divided by its norm first;
    a map of zeros stays zero, and gets no gradient.

    Shape:
        student: (B, classes, H, W); teacher: (B, classes, I, J). Sizes may differ.

    Raises:
        ValueError: For other classes than the teacher's, a resolution below 1, and for features that are no maps.
    """
    _check_resolution(resolution)
    check_maps(student, "class_attention_transfer")
    check_maps(teacher, "class_attention_transfer")
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student has activation maps of {student.shape[1]} classes and the teacher of {teacher.shape[1]}, "
            "expected the same classes in the same order"
        )
    s, t = (_pooled(x, resolution).flatten(2) for x in (student, teacher.detach()))
    return F.mse_loss(_directions(s), _directions(t)) if normalize else F.mse_loss(s, t)


class CATKD(FeatureLoss):
    """Which parts of the image speak for which class; see :func:`class_attention_transfer`.

    A class activation map is the classifier's weight applied at each place of the map whose mean over space the
    classifier reads. The student's classifier is trained through it, too; the teacher's is read once.

    Args:
        student_layer: Name of the last layer that gives maps.
        teacher_layer: The teacher's; the student's name unless given.
        student_classifier: Name of the linear layer, or 1 × 1 convolution, that gives the logits.
        teacher_classifier: The teacher's; the student's name unless given.
        resolution: Height and width to which the maps are pooled.
        normalize: Compare the maps' shapes without their sizes.
        weight: Factor of the term.

    Raises:
        ValueError: For a resolution below 1; in :meth:`attach`, for a classifier of another kind.
    """

    needs_same_classes = over_classes = True
    teacher_weight: Tensor

    needs_teacher_network = True

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | None = None,
        student_classifier: str = "fc",
        teacher_classifier: str | None = None,
        resolution: int = 2,
        normalize: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        _check_resolution(resolution)
        self.student_classifier, self.teacher_classifier = student_classifier, teacher_classifier or student_classifier
        self.resolution, self.normalize = resolution, normalize
        # In a tuple the network is no submodule: the optimizer and the checkpoint have it already.
        self._student: tuple[nn.Module, ...] = ()

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        assert teacher is not None
        _weight(student, self.student_classifier)
        self._student = (student,)
        # Not in checkpoints: it is the teacher's.
        weight = _weight(teacher, self.teacher_classifier).detach().clone()
        self.register_buffer("teacher_weight", weight, persistent=False)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        if not self._student:
            raise ValueError("the classifiers are not known, expected a call of attach(student, teacher) before")
        s, t = self.features(student, teacher)
        # By its name in each step: the layer may have been replaced by a fake-quantised one, say.
        weight = _weight(self._student[0], self.student_classifier)
        return class_attention_transfer(
            _activation_maps(s, weight, self.student_classifier, self.resolution),
            _activation_maps(t, self.teacher_weight, self.teacher_classifier, self.resolution),
            resolution=self.resolution,
            normalize=self.normalize,
        )


def _check_resolution(resolution: int) -> None:
    if resolution < 1:
        raise ValueError(f"expected resolution >= 1, got {resolution}: the authors take 2, or 4")


def _pooled(maps: Tensor, resolution: int) -> Tensor:
    # Maps of that size stay as they are anyway, but it takes PyTorch long to find out.
    return maps if maps.shape[2:] == (resolution, resolution) else F.adaptive_avg_pool2d(maps, resolution)


def _directions(maps: Tensor) -> Tensor:
    # At a map of zeros normalize's gradient is 1e12 times too large.
    return F.normalize(maps, dim=2).where((maps != 0).any(2, keepdim=True), 0.0)


def _weight(network: nn.Module, name: str) -> Tensor:
    layer = find_layer(network, name)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2 or weight[0, 0].numel() != 1:
        raise ValueError(
            f"cat_kd: the classifier {name!r} of {type(network).__name__} is a {type(layer).__name__}, expected a "
            "linear layer or a 1x1 convolution: name the layer that gives the logits"
        )
    return weight.flatten(1)


def _activation_maps(feature: Tensor, weight: Tensor, name: str, resolution: int) -> Tensor:
    """Return the pooled maps (B, classes, resolution, resolution)."""
    check_maps(feature, "cat_kd")
    if feature.shape[1] != weight.shape[1]:
        raise ValueError(
            f"the layer has {feature.shape[1]} channels and the classifier {name!r} reads {weight.shape[1]}, expected "
            "as many: name the layer whose mean over space the classifier reads"
        )
    # Pooled first, which gives the same: there is no full map of each class then.
    return F.conv2d(_pooled(feature, resolution), weight.to(feature.dtype)[:, :, None, None])
