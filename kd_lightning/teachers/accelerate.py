"""Ways to run a frozen network that give equal results in less time."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.outputs import Outputs, run
from kd_lightning.processor import instructions
from kd_lightning.tasks.batch import Batch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = ("channels_last", *DTYPES, "compile")


class Way(NamedTuple):
    """How a network is run.

    Attributes:
        channels_last: Its four-dimensional weights are in that memory format; convolutions then hand it on.
        dtype: Of autocast, the weights stay what they are; None for the precision that the training has.
    """

    channels_last: bool = False
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        names = ["channels_last"] * self.channels_last + [name for name, dtype in DTYPES.items() if dtype == self.dtype]
        return " + ".join(names) or "plain"


def parse(options: Iterable[str]) -> Way:
    """Return the way that names stand for; ``compile`` is no part of it.

    Raises:
        ValueError: For an unknown name, and for two precisions.
    """
    options = tuple(options)
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"expected accelerate to be 'auto', or some of {', '.join(OPTIONS)}; got {unknown[0]!r}")
    dtypes = [DTYPES[name] for name in options if name in DTYPES]
    if len(dtypes) > 1:
        raise ValueError("expected one precision in accelerate, got bfloat16 and float16: leave one out")
    return Way("channels_last" in options, dtypes[0] if dtypes else None)


def candidates(network: nn.Module, device: torch.device) -> list[Way]:
    """Return the ways that may be faster here. Not compiling: it takes longer than a few batches tell about."""
    formats = [False, True] if any(weight.ndim == 4 for weight in network.parameters()) else [False]
    weights = {weight.dtype for weight in network.parameters() if weight.is_floating_point()}
    lower = weights == {torch.float32} and not torch.is_autocast_enabled(device.type)
    dtypes = [None, *(dtype for dtype in DTYPES.values() if lower and has_precision(device, dtype))]
    return [Way(channels_last, dtype) for dtype in dtypes for channels_last in formats if channels_last or dtype]


def check_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where a device only emulates a precision."""
    if not has_precision(device, dtype):
        name = next(name for name, known in DTYPES.items() if known == dtype)
        raise ValueError(
            f"accelerate={name!r} expects a device with instructions for it, got {device.type!r} without, which would "
            "take many times longer: leave it out, or take accelerate='auto'"
        )


def has_precision(device: torch.device, dtype: torch.dtype, found: Collection[str] | None = None) -> bool:
    """Tell whether a device has instructions for a precision; torch says yes to an emulated one too.

    ``found`` are the processor's instruction sets, this machine's unless given.
    """
    if device.type == "cpu":
        # Not float16: with avx512_fp16 it took 1.5 times as long as float32.
        known = {"avx512_bf16", "amx_bf16", "bf16"}
        return dtype == torch.bfloat16 and not known.isdisjoint(instructions() if found is None else found)
    if device.type == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cuda"


def set_memory_format(network: nn.Module, channels_last: bool) -> None:
    """Lay four-dimensional weights out in place; their values stay."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for weight in (*network.parameters(), *network.buffers()):
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=memory_format)


def run_in(way: Way, network: nn.Module, batch: Batch, layers: Iterable[str]) -> Outputs:
    """Call a network that is in the way's memory format. What comes is in the precision that it would have without."""
    if way.dtype is None:
        return run(network, batch.args, batch.kwargs, layers)
    with torch.autocast(device_of(network, batch).type, way.dtype):
        outputs = run(network, batch.args, batch.kwargs, layers)
    features = {name: _up(feature) for name, feature in outputs.features.items()}
    return outputs._replace(logits=_up(outputs.logits), features=features)


def device_of(network: nn.Module, batch: Batch) -> torch.device:
    tensors = (x for x in (*network.parameters(), *batch.args, *batch.kwargs.values()) if isinstance(x, Tensor))
    return next((x.device for x in tensors), torch.device("cpu"))


def _up(x: Tensor) -> Tensor:
    return x.float() if x.dtype in DTYPES.values() else x
