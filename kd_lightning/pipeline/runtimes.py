"""Exported files in the runtimes that serve them: what they predict, and how fast they are."""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_lightning.pipeline.latency import Latency, batch_of, figures, times_s

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

Served = Callable[[Any], NDArray[np.float32]]
"""From a batch of images, (B, ...) in float32, to logits (B, C)."""


def open_file(path: Path, runtime: str = "onnxruntime") -> Served:
    """Load a file with one input and one output, to run on one thread of the CPU."""
    if runtime == "openvino":
        import openvino

        # f32: the runtime would otherwise take bfloat16 for what is not int8, where the CPU has it.
        options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
        return lambda batch: compiled([batch])[0]
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
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
