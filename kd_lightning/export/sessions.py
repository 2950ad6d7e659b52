"""A file and a runtime: from inputs to outputs."""

import gc
import os
from collections.abc import Callable, Sequence
from functools import cache
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
        model = openvino_core().read_model(str(path))
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

    leave_to_this_process()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])


def in_openvino(model: Any, threads: int) -> Any:
    """Return an ``openvino.CompiledModel`` of a path, or of a model."""
    leave_to_this_process()
    # f32: the runtime would otherwise take bfloat16 for what is not int8, where the CPU has it.
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino_core().compile_model(model, "CPU", options)


@cache
def openvino_core() -> Any:
    """Return this process's ``openvino.Core``.

    It may have only one at a time: each gives its thread a stack for signals, and puts back the one before when it is
    deleted, though that may be gone. Where two are deleted in the order in which they came, the next signal for Python
    (Ctrl-C, or a worker that ends) ends the process by a segmentation fault that no handler sees.
    """
    import openvino

    return openvino.Core()


@cache
def leave_to_this_process() -> None:
    """Let no process that is forked from this one, such as a worker of a DataLoader, delete this one's sessions.

    A session has threads, which a fork does not copy. Where a worker's garbage collector finds a session that was no
    longer used, ONNX Runtime's destructor joins threads that are not there, and the worker dies by a segmentation fault
    (with four threads or more: https://github.com/microsoft/onnxruntime/pull/31961); OpenVINO's waits for ever.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=gc.freeze)  # what a child inherits is then never collected there


def _in_order(found: Any, values: Sequence[str]) -> Sequence[Any]:
    """Return the arrays of these names; without names, all."""
    return [found[name] for name in values] if values else found.to_tuple()
