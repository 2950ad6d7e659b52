"""Where teacher outputs come from."""

from kd_lightning.teachers.base import TeacherSource
from kd_lightning.teachers.by_name import from_timm, from_torchvision, from_transformers
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.from_batch import FromBatch
from kd_lightning.teachers.live import Teacher
from kd_lightning.teachers.momentum import Momentum
from kd_lightning.teachers.peers import Peers
from kd_lightning.teachers.runtime import RuntimeTeacher
from kd_lightning.teachers.stored import Stored

__all__ = [
    "Ensemble",
    "FromBatch",
    "Momentum",
    "Peers",
    "RuntimeTeacher",
    "Stored",
    "Teacher",
    "TeacherSource",
    "from_timm",
    "from_torchvision",
    "from_transformers",
]
