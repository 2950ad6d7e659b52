"""The networks of the published result tables, and small ones for the default run and the other tasks."""

from kd_lightning.models.cifar_resnet import CIFARResNet, resnet8x4, resnet32x4
from kd_lightning.models.gpt import GPT
from kd_lightning.models.hugging_face import hugging_face
from kd_lightning.models.sentences import SentenceEncoder, TokenEncoder
from kd_lightning.models.small import CNN8, CNN64, MLP32
from kd_lightning.models.tabular import TabularMLP
from kd_lightning.models.tagger import Tagger
from kd_lightning.models.unet import UNet

__all__ = [
    "CNN8",
    "CNN64",
    "GPT",
    "MLP32",
    "CIFARResNet",
    "SentenceEncoder",
    "TabularMLP",
    "Tagger",
    "TokenEncoder",
    "UNet",
    "hugging_face",
    "resnet8x4",
    "resnet32x4",
]
