"""A network as an ONNX file, in int8, and its way through a runtime."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.outputs import run
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.accelerate import cpu_flags

Session = Callable[[Batch], list[Tensor]]
"""From a batch on the CPU to logits and layers."""
_PACKAGES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),  # int8 is made by onnxruntime for both
}


def check_runtime(runtime: str) -> None:
    """Raise ValueError for an unknown runtime, ImportError where its packages are missing."""
    if runtime not in _PACKAGES:
        raise ValueError(f"expected runtime to be one of {', '.join(_PACKAGES)}, got {runtime!r}")
    missing = [name for name in _PACKAGES[runtime] if find_spec(name) is None]
    if missing:
        extra = "onnx" if runtime == "onnxruntime" else runtime
        raise ImportError(
            f"a teacher through {runtime} expects the packages {', '.join(_PACKAGES[runtime])}, got none of the name "
            f"{', '.join(missing)}: pip install 'kd-lightning[{extra}]'"
        )


class _Positional(nn.Module):
    """The network with tensors for arguments and for results: logits, then the layers."""

    def __init__(self, network: nn.Module, positional: int, names: Sequence[str], layers: Sequence[str]) -> None:
        super().__init__()
        self.network, self.positional, self.names, self.layers = network, positional, names, layers

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        kwargs = dict(zip(self.names, inputs[self.positional :], strict=True))
        outputs = run(self.network, inputs[: self.positional], kwargs, self.layers)
        return outputs.logits, *(outputs.features[name] for name in self.layers)


def on_cpu(batch: Batch) -> Batch:
    """Return what the network gets, on the CPU, numbers in float32.

    Raises:
        ValueError: For arguments that are no tensors.
    """
    inputs = [*batch.args, *batch.kwargs.values()]
    if not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs)
        raise ValueError(
            f"a teacher through a runtime expects tensors alone, got {kinds}: wrap the network in a module that takes "
            "tensors"
        )
    args = tuple(_plain(x) for x in batch.args)
    return Batch(args, {name: _plain(x) for name, x in batch.kwargs.items()}, None)


def _plain(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32 if x.is_floating_point() else None).contiguous()


def export(network: nn.Module, batch: Batch, layers: Sequence[str], path: Path) -> None:
    """Write a network in eval mode; for batches of any size of samples with the shape of these."""
    inputs = (*batch.args, *batch.kwargs.values())
    module = _Positional(network, len(batch.args), tuple(batch.kwargs), layers).eval()
    with _quietly():
        torch.onnx.export(
            module,
            inputs,
            path,
            input_names=[*_feed(batch)],
            dynamic_shapes=(tuple({0: "batch"} for _ in inputs),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a line for each operator of packages that the network has nothing to do with."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def quantize(source: Path, target: Path, batches: Sequence[Batch]) -> None:
    """Write an int8 file: static ranges from these batches, one scale for each output channel of a weight."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else _feed(batch)

    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        target,
        Reader(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        # Without these instructions two products of 8 bits overflow the 16 bits in which they are added.
        reduce_range=cpu_flags().isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}),
    )


def open_session(path: Path, runtime: str) -> Session:
    """Load a file into a runtime, with as many threads as torch has."""
    threads = torch.get_num_threads()
    if runtime == "openvino":
        import openvino

        # f32: the runtime would otherwise take bfloat16 for what is not int8, where the CPU has it.
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
        return lambda batch: [torch.from_numpy(x) for x in compiled(_feed(batch)).to_tuple()]
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda batch: [torch.from_numpy(x) for x in session.run(None, _feed(batch))]


def _feed(batch: Batch) -> dict[str, Any]:
    return {f"input{i}": x.numpy() for i, x in enumerate((*batch.args, *batch.kwargs.values()))}
