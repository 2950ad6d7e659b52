"""The networks of the published result tables, and small ones for the default run."""

from kd_lightning.models.cifar_resnet import CIFARResNet, resnet8x4, resnet32x4
from kd_lightning.models.small import CNN8, CNN64, MLP32

__all__ = ["CNN8", "CNN64", "MLP32", "CIFARResNet", "resnet8x4", "resnet32x4"]
