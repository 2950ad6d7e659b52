"""What the losses on features have in common: shapes, and projectors from the student's to the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embedding(feature: Tensor) -> Tensor:
    """Return one vector a sample (B, D): of maps (B, C, H, W) or tokens (B, S, D) the mean over space or tokens."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature


def directions(vectors: Tensor) -> Tensor:
    """Divide vectors (..., D) by their length; one of zeros stays so, with a gradient of zero."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    some = length > 0
    divided: Tensor = (vectors / length.where(some, 1.0)).where(some, 0.0)
    return divided


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, C, H, W) to the smaller's height and width; the rest stays as it is."""
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def project(projector: nn.Module, feature: Tensor) -> Tensor:
    """Call a projector in its parameters' precision (bfloat16 where the whole training is), and come back to ours."""
    parameter = next(projector.parameters(), None)
    projected: Tensor = projector(feature if parameter is None else feature.to(parameter.dtype))
    return projected.to(feature.dtype)


def projector(student: Tensor, teacher: Tensor, what: str, kernel_size: int = 1) -> nn.Module:
    """Make a convolution for maps, a linear layer for tokens and vectors, from the student's channels to the teacher's.

    Raises:
        ValueError: For layers of different kinds (a map and a vector).
    """
    check_same_kind(student, teacher, what)
    if student.ndim == 4:
        return nn.Conv2d(student.shape[1], teacher.shape[1], kernel_size, padding=kernel_size // 2)
    return nn.Linear(student.shape[-1], teacher.shape[-1])


def check_same_kind(student: Tensor, teacher: Tensor, what: str) -> None:
    """Raise ValueError unless both are maps, both tokens or both vectors."""
    if student.ndim != teacher.ndim or student.ndim not in (2, 3, 4):
        raise ValueError(
            f"{what}: the student's layer gives {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}, "
            "expected both (B, C, H, W), (B, S, D) or (B, D): name layers of the same kind"
        )


def check_maps(feature: Tensor, what: str) -> None:
    """Raise ValueError unless the feature is a map."""
    if feature.ndim != 4:
        raise ValueError(
            f"{what}: expected maps (B, C, H, W), got {tuple(feature.shape)}: name a convolutional layer, or take a "
            "loss on vectors such as rkd"
        )


def check_same_channels(student: Tensor, teacher: Tensor, what: str) -> None:
    """Raise ValueError unless both maps have as many channels."""
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{what}: the student's layer has {student.shape[1]} channels and the teacher's {teacher.shape[1]}, "
            "expected as many: name other layers, or take a loss that projects, such as hint"
        )
