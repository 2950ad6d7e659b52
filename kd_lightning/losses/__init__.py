"""Distillation losses: for each method the function (the formula) and the module (weight, layers, projectors)."""

from kd_lightning.losses.ab import AB, activation_boundary
from kd_lightning.losses.base import DistillationLoss, FeatureLoss, LayersLoss, LogitLoss
from kd_lightning.losses.deit import DeiTHard, deit_hard
from kd_lightning.losses.hard_label import HardLabel, hard_label
from kd_lightning.losses.hint import Hint, hint
from kd_lightning.losses.kd import KD, kd
from kd_lightning.losses.standardize import standardize_logits
from kd_lightning.losses.vid import VID, vid

__all__ = [
    "AB",
    "KD",
    "VID",
    "DeiTHard",
    "DistillationLoss",
    "FeatureLoss",
    "HardLabel",
    "Hint",
    "LayersLoss",
    "LogitLoss",
    "activation_boundary",
    "deit_hard",
    "hard_label",
    "hint",
    "kd",
    "standardize_logits",
    "vid",
]
