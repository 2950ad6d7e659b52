"""Exported files in the runtimes that serve them: what they predict, and how fast they are."""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.export.sessions import in_onnxruntime, in_openvino
from kd_lightning.pipeline.latency import Latency, batch_of, figures, times_s

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

Served = Callable[[Any], NDArray[np.float32]]
"""From a batch of images, (B, ...) in float32, to logits (B, C)."""


def open_file(path: Path, runtime: str = "onnxruntime") -> Served:
    """Load a file with one input and one output, to run on one thread of the CPU."""
    if runtime == "openvino":
        compiled = in_openvino(str(path), threads=1)
        return lambda batch: compiled([batch])[0]
    session = in_onnxruntime(str(path), threads=1)
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})[0]


def measure_files(files: Mapping[str, Path], example: Tensor, *, seconds: float = 2.5) -> dict[str, dict[str, Latency]]:
    """Time all files side by side as :func:`~kd_lightning.pipeline.latency.measure` does, on one thread.

    Shape: example (1, ...).

    Returns:
        By runtime (``onnxruntime``, and ``openvino`` where it is installed), then by name.
    """
    measured = {}
    single, batch = (x.numpy() for x in (example, batch_of(example)))
    for runtime, title in NAMES.items():
        if find_spec(runtime) is None:
            continue
        served = {name: open_file(path, runtime) for name, path in files.items()}
        singles = times_s(served, single, calls=5, seconds=seconds / 2)
        batches = times_s(served, batch, calls=1, seconds=seconds / 2)
        measured[runtime] = figures(singles, batches, title)
    return measured


def predictions(path: Path, batches: Iterable[Tensor]) -> NDArray[np.int64]:
    """Return the classes that a file finds most likely in ONNX Runtime, (N,)."""
    served = open_file(path)
    return np.concatenate([served(batch.numpy()).argmax(-1) for batch in batches])
