"""Channel-wise Knowledge Distillation for Dense Prediction (Shu et al., ICCV 2021), https://arxiv.org/abs/2011.13256."""

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss, check_same_shape, check_temperature
from kd_lightning.losses.features import check_maps, project, projector, same_size
from kd_lightning.outputs import Outputs


def cwd(student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 4.0) -> Tensor:
    """T²·KL(softmax(t / T) ‖ softmax(s / T)), softmax over the places of a channel, averaged over channels and samples.

    Shape:
        student, teacher: (B, C, H, W), equal: feature maps, or logits with a class a channel.

    Raises:
        ValueError: For a temperature ≤ 0, unequal shapes, and for features that are no maps.
    """
    check_temperature(temperature)
    check_maps(student, "cwd")
    check_same_shape(student, teacher, "maps")
    s, t = (F.log_softmax(x.flatten(2) / temperature, -1) for x in (student, teacher.detach()))
    total = F.kl_div(s, t, reduction="sum", log_target=True)
    return temperature**2 * total / (s.shape[0] * s.shape[1])


class CWD(FeatureLoss):
    """Where in the image each channel is active; see :func:`cwd`.

    Maps of other channels than the teacher's go through a learnt 1 × 1 convolution; where the sizes differ, the larger
    is average-pooled to the smaller. All pixels count, labelled or not.

    Args:
        student_layer: Name of a layer that gives maps; the logits (B, C, H, W) unless given.
        teacher_layer: The teacher's; the student's name unless given.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term; the authors use 3 for logits at T = 4.

    Raises:
        ValueError: For a temperature ≤ 0, and for a teacher's layer without a student's.
    """

    projector: nn.Module

    def __init__(
        self,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        temperature: float = 4.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        check_temperature(temperature)
        self.temperature = temperature
        self.needs_same_classes = not self.student_layers
        self.projector = nn.Identity()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        s, t = self.features(student, teacher)
        check_maps(s, "cwd")
        check_maps(t, "cwd")
        if self.student_layers and s.shape[1] != t.shape[1]:
            self.projector = projector(s, t, "cwd")

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        s, t = same_size(*self.features(student, teacher))
        return cwd(project(self.projector, s), t, temperature=self.temperature)
