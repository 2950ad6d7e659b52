"""The samples of all processes, for losses that compare samples."""

from collections.abc import Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from kd_lightning.outputs import Outputs, Samples, TopK


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """Concatenate the batches of all processes, in the processes' order; they may differ in length.

    Backward, the gradients of all processes are summed. When each of them computes the same loss of the whole batch and
    DDP then takes the mean over processes, the parameters get the gradient that one process would have got.

    Shape: (B, ...) to (sum of all B, ...).
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


@overload
def gather_outputs(outputs: Outputs, layers: Iterable[str]) -> Outputs: ...
@overload
def gather_outputs(outputs: Outputs | TopK, layers: Iterable[str]) -> Outputs | TopK: ...
def gather_outputs(outputs: Outputs | TopK, layers: Iterable[str]) -> Outputs | TopK:
    """Gather logits or the best classes, sample numbers and the features of the given layers."""
    features = {name: all_gather(outputs.features[name]) for name in layers}
    if isinstance(outputs, TopK):
        return TopK(all_gather(outputs.indices), all_gather(outputs.log_probs), features)
    samples = outputs.samples
    return Outputs(
        all_gather(outputs.logits),
        features,
        None if samples is None else Samples(all_gather(samples.ids), samples.total),
    )


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.tensor([len(x)], device=x.device)
        lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, length)
        sizes = [int(n) for n in lengths]
        # Collectives want one shape: the shorter ones are padded, and cut again.
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.start, ctx.length = sum(sizes[: dist.get_rank()]), len(x)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.length]
