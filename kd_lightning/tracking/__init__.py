"""What a run leaves in MLflow."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_lightning.tracking.logger import MLFlowLogger

__all__ = ["MLFlowLogger"]


def __getattr__(name: str) -> Any:
    """Import the logger when it is asked for: it takes seconds, which journals and the report need not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kd_lightning.tracking.logger import MLFlowLogger

    globals()["MLFlowLogger"] = MLFlowLogger
    return MLFlowLogger
