"""A file and a runtime: from inputs to outputs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lightning.export.batches import feed
from kd_lightning.tasks.batch import Batch

Session = Callable[[Batch], list[Tensor]]
"""From a batch on the CPU to logits and layers."""


def open_session(path: Path, runtime: str, values: Sequence[str] = ()) -> Session:
    """Load a file into ``onnxruntime`` or ``openvino``, with as many threads as torch has.

    Args:
        path: Of the file.
        runtime: That is installed.
        values: Names inside the graph, to give instead of its outputs.
    """
    threads = torch.get_num_threads()
    if runtime == "openvino":
        import openvino

        model = openvino.Core().read_model(str(path))
        if values:
            given = {name for output in model.outputs for name in output.get_names()}
            model.add_outputs([name for name in values if name not in given])
        compiled = in_openvino(model, threads)
        return lambda batch: [torch.from_numpy(x) for x in _in_order(compiled(feed(batch)), values)]
    source: Any = str(path)
    if values:
        import onnx

        model = onnx.load(path)
        given = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in given)
        source = model.SerializeToString()
    session = in_onnxruntime(source, threads)
    return lambda batch: [torch.from_numpy(x) for x in session.run(list(values) or None, feed(batch))]


def in_onnxruntime(source: str | bytes, threads: int) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of a path, or of a file's content."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


def in_openvino(model: Any, threads: int) -> Any:
    """Return an ``openvino.CompiledModel`` of a path, or of a model."""
    import openvino

    # f32: the runtime would otherwise take bfloat16 for what is not int8, where the CPU has it.
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", options)


def _in_order(found: Any, values: Sequence[str]) -> Sequence[Any]:
    """Return the arrays of these names; without names, all."""
    return [found[name] for name in values] if values else found.to_tuple()
