"""Knowledge distillation for Lightning: train a small student on a large teacher's outputs."""

import sys
from pathlib import Path

try:
    import lightning.pytorch  # noqa: F401  # from here: it takes 5 % longer from the depth of the imports below
except Exception as error:
    said = " ".join(str(error).split())
    if "torchvision" not in said:
        raise
    remedy = (
        f"Lightning cannot be imported, as the installed torchvision cannot ({said}), expected one that was built for "
        "this torch: install both from the same index, or uninstall torchvision"
    )
    if sys.argv[0] == "-m" or Path(sys.argv[0]).stem == "kd-lightning":  # ahead of all that could say it in a line
        raise SystemExit(f"kd-lightning: {remedy}") from error
    raise ImportError(remedy) from error

from kd_lightning.callbacks import Distillation
from kd_lightning.checkpoint import load_student
from kd_lightning.module import DistillationModule
from kd_lightning.outputs import Outputs
from kd_lightning.teachers import Teacher

__all__ = ["Distillation", "DistillationModule", "Outputs", "Teacher", "load_student"]
