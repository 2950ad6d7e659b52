"""What whole commands do slowly, and tests need once: each function lets this process do it in less time.

What comes out is the same, but for the latencies, which no test asserts, and for what the report shows examples of.
"""

import copy
import functools
import os
import shutil
from pathlib import Path
from typing import Any

MIGRATE = "KD_TESTS_MIGRATE"
"""A variable in the environment of a command that makes its store as a user's does."""


def read_operators_once() -> None:
    """Make the table of ONNX operators once, of which each export gets a copy: PyTorch takes half a second for each."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    if hasattr(ONNXRegistry.from_torchlib, "__wrapped__"):
        return
    made = functools.cache(ONNXRegistry.from_torchlib)

    @functools.wraps(ONNXRegistry.from_torchlib)
    def from_torchlib(*arguments: Any, **named: Any) -> ONNXRegistry:
        registry = copy.copy(made(*arguments, **named))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[assignment]


def measure_briefly() -> None:
    """Measure latencies for a tenth of a second in place of 2.5 seconds, in each runtime."""
    from kd_lightning.pipeline import measure

    for function in (measure.measure, measure.measure_files, measure.measure_writing):
        assert "seconds" in function.__kwdefaults__
        function.__kwdefaults__["seconds"] = 0.1


def look_briefly() -> None:
    """Let the report look at no more than 300 outputs of each network, in place of 20,000."""
    from kd_lightning.pipeline import soft_outputs

    assert soft_outputs.MOST_OUTPUTS > 300
    soft_outputs.MOST_OUTPUTS = 300


def migrate_once(database: Path) -> None:
    """Copy new stores from the first that is made, which is kept at ``database``: MLflow takes seconds for each."""
    from kd_lightning.tracking import sqlite

    create = sqlite._create

    def copied(file: Path) -> None:
        if MIGRATE in os.environ or not database.is_file():
            create(file)
            _copy_whole(file, database)
        else:
            _copy_whole(database, file)

    sqlite._create = copied


def _copy_whole(file: Path, to: Path) -> None:
    unfinished = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.copy(file, unfinished)
    unfinished.replace(to)
