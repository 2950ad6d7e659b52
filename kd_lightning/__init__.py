"""Knowledge distillation for Lightning: train a small student on a large teacher's outputs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lightning.callbacks import Distillation
    from kd_lightning.checkpoint import load_student
    from kd_lightning.module import DistillationModule
    from kd_lightning.outputs import Outputs
    from kd_lightning.teachers import Teacher

__all__ = ["Distillation", "DistillationModule", "Outputs", "Teacher", "load_student"]

_IN_COMMAND = sys.argv[:1] == ["-m"] or Path((sys.argv or [""])[0]).stem.startswith("kd-lightning")


def load() -> None:
    """Import what this package exports, which takes seconds; the command does so once it has a configuration."""
    try:
        import lightning.pytorch  # noqa: F401  # from here: it takes 5 % longer from the depth of the imports below
    except Exception as error:
        said = " ".join(str(error).split())
        if "torchvision" not in said:
            raise
        remedy = (
            f"Lightning cannot be imported, as the installed torchvision cannot ({said}), expected one that was built "
            "for this torch: install both from the same index, or uninstall torchvision"
        )
        if _IN_COMMAND:  # ahead of all that could say it in a line
            raise SystemExit(f"kd-lightning: {remedy}") from error
        raise ImportError(remedy) from error

    from kd_lightning.callbacks import Distillation
    from kd_lightning.checkpoint import load_student
    from kd_lightning.module import DistillationModule
    from kd_lightning.outputs import Outputs
    from kd_lightning.teachers import Teacher

    globals().update(
        {each.__name__: each for each in (Distillation, DistillationModule, Outputs, Teacher, load_student)}
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load()
    return globals()[name]


if not _IN_COMMAND:
    load()
