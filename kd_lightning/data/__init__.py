"""LightningDataModules that know which samples are the teacher's and which the student's."""

from kd_lightning.data.cifar import CIFAR10, CIFAR100
from kd_lightning.data.completions import Completions
from kd_lightning.data.diabetes import Diabetes
from kd_lightning.data.fashion_items import FashionItems
from kd_lightning.data.fashion_mnist import FashionMNIST
from kd_lightning.data.image_folder import ImageFolder
from kd_lightning.data.punctuation import ShakespearePunctuation
from kd_lightning.data.sentences import ShakespeareSentences
from kd_lightning.data.shakespeare_text import ShakespeareText
from kd_lightning.data.shape_geometry import ShapeGeometry
from kd_lightning.data.shape_masks import ShapeMasks
from kd_lightning.data.texts import TextData, TextFiles
from kd_lightning.data.with_ids import WithIds

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Completions",
    "Diabetes",
    "FashionItems",
    "FashionMNIST",
    "ImageFolder",
    "ShakespearePunctuation",
    "ShakespeareSentences",
    "ShakespeareText",
    "ShapeGeometry",
    "ShapeMasks",
    "TextData",
    "TextFiles",
    "WithIds",
]
