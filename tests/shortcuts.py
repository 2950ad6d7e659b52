"""What is slow and what tests need many times: each function lets this process do it in less time.

What comes out is the same, but for the latencies, which no test asserts, and for what the report shows examples of.
"""

import copy
import functools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

MIGRATE = "KD_TESTS_MIGRATE"
"""A variable in the environment of a command that makes its store as a user's does."""
FEW_SAMPLES = "KD_TESTS_FEW_SAMPLES"
"""A variable in the environment of a command that is to call :func:`read_few`."""
DATABASE = "KD_TESTS_DATABASE"
"""A variable that names the file in which the first new store of all the tests is kept."""


def take(*, imported: bool = False) -> None:
    """Call every function below; with ``imported`` only those whose module this process has imported so far."""
    for module, shortcut in {
        "torch.onnx._internal.exporter._registration": read_operators_once,
        "torch.onnx._internal.exporter._core": list_operators_once_an_export,
        "kd_lightning.pipeline.measure": measure_briefly,
        "kd_lightning.pipeline.soft_outputs": look_briefly,
        "kd_lightning.tracking.sqlite": migrate_once,
    }.items():
        if not imported or module in sys.modules:
            shortcut()


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


def list_operators_once_an_export() -> None:
    """Ask for PyTorch's composite operators twice in an export, in place of twice for each namespace."""
    from torch._export import utils
    from torch.export import decomp_utils, exported_program

    collect, materialize = utils._collect_all_valid_cia_ops, utils._materialize_cpp_cia_ops
    if hasattr(collect, "__wrapped__"):
        return

    @functools.wraps(collect)
    def collected() -> Any:
        materialize()
        utils._materialize_cpp_cia_ops = lambda: None
        try:
            return collect()
        finally:
            utils._materialize_cpp_cia_ops = materialize

    for module in (utils, decomp_utils, exported_program):
        module._collect_all_valid_cia_ops = collected  # type: ignore[attr-defined]


def read_few() -> None:
    """Leave 100 of the packaged images to validate and to test with, and the beginning of each play.

    For what holds of any samples: most of a small pipeline's time goes into judging its networks.
    """
    from kd_lightning.data import fashion_items, fashion_mnist, punctuation, sentences, shakespeare_text

    arrays = fashion_mnist.read_packaged()
    images = {name: array if name.startswith("train") else array[:100] for name, array in arrays.items()}
    fashion_mnist.read_packaged = fashion_items.read_packaged = lambda: images
    whole = shakespeare_text.read_plays()
    plays = {name: text[:8000] for name, text in whole.items()}
    with_alphabet = {name: text + "".join(sorted(set(whole[name]))) for name, text in plays.items()}
    shakespeare_text.read_plays = lambda: with_alphabet
    punctuation.read_plays = sentences.read_plays = lambda: plays


def measure_briefly() -> None:
    """Measure latencies for a tenth of a second in place of 2.5 seconds, in each runtime."""
    from kd_lightning.pipeline import measure

    for function in (measure.measure, measure.measure_files, measure.measure_writing):
        assert "seconds" in function.__kwdefaults__
        function.__kwdefaults__["seconds"] = 0.1


def look_briefly() -> None:
    """Let the report look at no more than 300 outputs of each network, in place of 20,000."""
    from kd_lightning.pipeline import soft_outputs

    assert soft_outputs.MOST_OUTPUTS in (20_000, 300)
    soft_outputs.MOST_OUTPUTS = 300


def migrate_once() -> None:
    """Copy new stores from the first that any process has made: MLflow takes seconds for each."""
    from kd_lightning.tracking import sqlite

    create = sqlite._create
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def copied(file: Path) -> None:
        kept = Path(os.environ.get(DATABASE, file))
        if MIGRATE in os.environ or not kept.is_file():
            create(file)
            if kept != file:
                _copy_whole(file, kept)
        else:
            _copy_whole(kept, file)

    sqlite._create = copied


def _copy_whole(file: Path, to: Path) -> None:
    unfinished = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.copy(file, unfinished)
    unfinished.replace(to)
