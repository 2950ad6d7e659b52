"""LightningDataModules that know which samples are the teacher's and which the student's."""

from kd_lightning.data.cifar import CIFAR10, CIFAR100
from kd_lightning.data.fashion_mnist import FashionMNIST
from kd_lightning.data.image_folder import ImageFolder
from kd_lightning.data.punctuation import ShakespearePunctuation
from kd_lightning.data.with_ids import WithIds

__all__ = ["CIFAR10", "CIFAR100", "FashionMNIST", "ImageFolder", "ShakespearePunctuation", "WithIds"]
