"""Distillation losses: for each method the function (the formula) and the module (weight, layers, projectors)."""

from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.deit import DeiTHard, deit_hard
from kd_lightning.losses.hard_label import HardLabel, hard_label
from kd_lightning.losses.hint import Hint, hint
from kd_lightning.losses.kd import KD, kd

__all__ = ["KD", "DeiTHard", "DistillationLoss", "HardLabel", "Hint", "deit_hard", "hard_label", "hint", "kd"]
