"""What a network costs to serve: size, latency and throughput, in eager PyTorch or as a file in its runtimes.

Figures go by the keys of :data:`~kd_lightning.records.FIGURES`: milliseconds for one sample (median and 95th
percentile), and samples a second in batches of 64.
"""

import io
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd_lightning.export.batches import as_batch, feed, on_cpu, tensors
from kd_lightning.export.sessions import in_onnxruntime, in_openvino
from kd_lightning.outputs import Outputs
from kd_lightning.tasks import Batch
from kd_lightning.writing import remembers, write

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_BATCH = 64
_TOKENS = 64

Arrays = dict[str, NDArray[Any]]
"""A file's inputs, by name."""


def measure(
    networks: Mapping[str, nn.Module], example: Batch | Tensor, *, seconds: float = 2.5
) -> dict[str, dict[str, float]]:
    """Time all networks side by side, so that whatever else the machine does hits each of them alike.

    One round times every network, the next begins with another one; half of `seconds` goes to batches of 1 and half
    to batches of 64. Each network gets at least one round, so large ones may take longer than `seconds`, and their p95
    is then of few calls. PyTorch's number of threads is left as it is. Training flags come back as they were.

    Args:
        networks: By name; eager, on the CPU.
        example: One sample as the networks take it: tensors (1, ...).
        seconds: For all together.

    Raises:
        ValueError: the example is not one sample, or something is not on the CPU.
    """
    inputs = tensors(example) if isinstance(example, Batch) else (example,)
    for x in inputs:
        if x.ndim < 1 or x.shape[0] != 1:
            raise ValueError(f"example has shape {tuple(x.shape)}, expected one sample (1, ...): pass batch[:1]")
    named = [("the example", x) for x in inputs]
    for name, network in networks.items():
        named += [(f"{name}.{key}", tensor) for key, tensor in network.state_dict(keep_vars=True).items()]
    for name, tensor in named:
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, latency is measured on the CPU: call .cpu() before")

    one = example if isinstance(example, Batch) else Batch((example,), {}, None)
    training = [(module, module.training) for network in networks.values() for module in network.modules()]
    try:
        for network in networks.values():
            network.eval()
        with torch.inference_mode():
            single, batch = (
                _times_s({name: _call(network, some) for name, network in networks.items()}, calls, seconds / 2)
                for some, calls in ((one, 5), (_repeated(one), 1))
            )
    finally:
        for module, flag in training:
            module.training = flag
    return _figures(single, batch)


def measure_files(
    files: Mapping[str, Path], example: Batch | Tensor, *, seconds: float = 2.5
) -> dict[str, dict[str, float]]:
    """Time all files side by side as :func:`measure` does, on one thread; in OpenVINO as well where it is installed.

    Args:
        files: By name.
        example: One sample as the networks take it: tensors (1, ...).
        seconds: For all together, in each runtime.

    Returns:
        By name; the figures of OpenVINO begin with ``openvino_``, and ``file_mb`` is the file's size.
    """
    one = on_cpu(example if isinstance(example, Batch) else as_batch(example), "a file")
    found = {name: {"file_mb": path.stat().st_size / 1e6} for name, path in files.items()}
    for runtime in NAMES:
        if find_spec(runtime) is None:
            continue
        opened = {name: OpenFile(path, runtime) for name, path in files.items()}
        single, batch = (
            _times_s({name: _call_file(file, file.feed(some)) for name, file in opened.items()}, calls, seconds / 2)
            for some, calls in ((one, 5), (_repeated(one), 1))
        )
        for name, figures in _figures(single, batch, "openvino_" if runtime == "openvino" else "").items():
            found[name] |= figures
    return found


def measure_writing(networks: Mapping[str, nn.Module], *, seconds: float = 2.5) -> dict[str, dict[str, float]]:
    """Time language models side by side as :func:`measure` does, while each writes one text, token by token.

    In eager PyTorch, with a cache of keys and values; a network that keeps none is left out.

    Args:
        networks: By name, on the CPU.
        seconds: For all together.

    Returns:
        ``tokens_per_s`` by name.
    """
    able = {name: network for name, network in networks.items() if remembers(network)}
    lengths = {name: _longest_text(network) for name, network in able.items()}
    times = _times_s({name: _call_writing(network, lengths[name]) for name, network in able.items()}, 1, seconds)
    return {name: {"tokens_per_s": lengths[name] / float(np.median(found))} for name, found in times.items()}


class OpenFile:
    """An exported file in a runtime, on one thread of the CPU.

    Args:
        path: Of the file.
        runtime: ``onnxruntime`` or ``openvino``.
    """

    def __init__(self, path: Path, runtime: str = "onnxruntime") -> None:
        self.run: Callable[[Arrays], NDArray[Any]]
        if runtime == "openvino":
            compiled = in_openvino(str(path), threads=1)
            self.names = [given.get_any_name() for given in compiled.inputs]
            self.run = lambda arrays: compiled(arrays)[0]
        else:
            session = in_onnxruntime(str(path), threads=1)
            self.names = [given.name for given in session.get_inputs()]
            self.run = lambda arrays: session.run(None, arrays)[0]

    def __call__(self, batch: Batch) -> Outputs:
        """Return what it gives for a batch on the CPU."""
        return Outputs(torch.from_numpy(self.run(self.feed(on_cpu(batch, "an exported file")))))

    def feed(self, batch: Batch) -> Arrays:
        """Return what the file takes of a batch: an input that the network does not use may be missing in it."""
        arrays = feed(batch)
        if len(arrays) == len(self.names) == 1:
            return {self.names[0]: next(iter(arrays.values()))}
        return {name: arrays[name] for name in self.names}


def size_mb(network: nn.Module) -> float:
    """Megabytes (10^6 bytes) of all weights as `torch.save` stores them on disk."""
    file = io.BytesIO()
    state = network.state_dict()
    # The weights that an adapter is beside are in no checkpoint of it, and are served all the same.
    torch.save({**state, **{name: value for name, value in network.named_parameters() if name not in state}}, file)
    return file.getbuffer().nbytes / 1e6


def parameters(network: nn.Module) -> int:
    """Number of parameters, trained or frozen; tied ones count once."""
    return sum(parameter.numel() for parameter in network.parameters())


def _repeated(sample: Batch) -> Batch:
    """Repeat a sample 64 times."""

    def repeated(x: Tensor) -> Tensor:
        return x.repeat(_BATCH, *[1] * (x.ndim - 1))

    args = tuple(map(repeated, sample.args))
    return Batch(args, {name: repeated(x) for name, x in sample.kwargs.items()}, None)


def _call(network: nn.Module, batch: Batch) -> Callable[[], object]:
    return lambda: network(*batch.args, **batch.kwargs)


def _call_file(file: OpenFile, arrays: Arrays) -> Callable[[], object]:
    return lambda: file.run(arrays)


def _call_writing(network: nn.Module, count: int) -> Callable[[], object]:
    first, uniform = torch.zeros(1, 1, dtype=torch.long), torch.rand(1, count, generator=torch.Generator())
    return lambda: write(network, first, uniform)


def _longest_text(network: nn.Module) -> int:
    """Return how many tokens it can write after one, 64 at most."""
    context = getattr(network, "context", None)
    if context is None:
        context = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    return min(_TOKENS, int(context)) if context is not None else _TOKENS


def _figures(
    single: Mapping[str, list[float]], batch: Mapping[str, list[float]], prefix: str = ""
) -> dict[str, dict[str, float]]:
    """Sum up the seconds of calls with one sample, and with 64."""
    return {
        name: {
            f"{prefix}latency_ms_p50": 1000 * float(np.percentile(single[name], 50)),
            f"{prefix}latency_ms_p95": 1000 * float(np.percentile(single[name], 95)),
            f"{prefix}throughput_per_s": _BATCH / float(np.median(batch[name])),
        }
        for name in single
    }


def _times_s(functions: Mapping[str, Callable[[], object]], calls: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each timed call, by name."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    end = time.perf_counter() + seconds
    warming_up = True  # the first round is not kept: allocator, threads and kernel choice settle in it
    while order and (warming_up or not times[order[0]] or time.perf_counter() < end):
        for name in order:
            call = functions[name]
            call()  # not timed: it brings back the weights that the other networks drove from the cache
            for _ in range(calls):
                start = time.perf_counter()
                call()
                if not warming_up:
                    times[name].append(time.perf_counter() - start)
        warming_up = False
        order = order[1:] + order[:1]
    return times
