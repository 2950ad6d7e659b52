"""What a network is called with, when it is written and when the file is run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.outputs import run
from kd_lightning.tasks.batch import Batch, check_numbers


class Positional(nn.Module):
    """A network with tensors for arguments and for results: logits, then the layers.

    Args:
        network: That is wrapped.
        batch: Says which arguments have names.
        layers: Whose outputs it gives.
        dtype: Of the network's weights, where that is not the inputs'; results are in float32.
    """

    def __init__(
        self, network: nn.Module, batch: Batch, layers: Sequence[str] = (), dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.network, self.positional, self.names = network, len(batch.args), tuple(batch.kwargs)
        self.layers, self.dtype = tuple(layers), dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = [x.to(self.dtype) if self.dtype and x.is_floating_point() else x for x in inputs]
        kwargs = dict(zip(self.names, given[self.positional :], strict=True))
        outputs = run(self.network, given[: self.positional], kwargs, self.layers)
        found = (outputs.logits, *(outputs.features[name] for name in self.layers))
        return tuple(x.float() for x in found) if self.dtype else found


def as_batch(example: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Batch:
    """Read inputs: one tensor, several, or by the names of ``forward``'s arguments.

    Raises:
        ValueError: Unless all are tensors of one number of samples, one at least, without NaN.
    """
    if isinstance(example, Mapping):
        batch = Batch((), dict(example), None)
    else:
        batch = Batch((example,) if isinstance(example, Tensor) else tuple(example), {}, None)
    batch = on_cpu(batch, "an exported file")
    sizes = {len(x) if x.ndim else 0 for x in tensors(batch)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"expected an example of one sample at least, the same number for each input, got {sorted(sizes)}: pass "
            "inputs as the network gets them, without targets"
        )
    check_numbers(batch, "the example")
    return batch


def on_cpu(batch: Batch, what: str) -> Batch:
    """Return what the network gets, on the CPU, numbers in float32.

    Raises:
        ValueError: For arguments that are no tensors.
    """
    inputs = tensors(batch)
    if not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs)
        raise ValueError(f"{what} expects tensors alone, got {kinds}: wrap the network in a module that takes tensors")
    args = tuple(_plain(x) for x in batch.args)
    return Batch(args, {name: _plain(x) for name, x in batch.kwargs.items()}, None)


def tensors(batch: Batch) -> tuple[Any, ...]:
    return (*batch.args, *batch.kwargs.values())


def input_names(batch: Batch) -> list[str]:
    """Return the inputs' names in a file: ``input``, or ``input0`` … where there are several; else those they have."""
    several = len(batch.args) > 1
    return [*(f"input{i}" if several else "input" for i in range(len(batch.args))), *batch.kwargs]


def feed(batch: Batch) -> dict[str, Any]:
    """Return the arrays by input name."""
    return {name: x.numpy() for name, x in zip(input_names(batch), tensors(batch), strict=True)}


def part(batch: Batch, samples: slice) -> Batch:
    return Batch(tuple(x[samples] for x in batch.args), {n: x[samples] for n, x in batch.kwargs.items()}, None)


def two(batch: Batch) -> Batch:
    """Return two samples: torch takes a batch of one for a size that never changes."""
    first = part(batch, slice(0, 2))
    if len(tensors(first)[0]) == 2:
        return first
    return Batch(
        tuple(torch.cat([x, x]) for x in first.args), {n: torch.cat([x, x]) for n, x in first.kwargs.items()}, None
    )


def _plain(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32 if x.is_floating_point() else None).contiguous()
