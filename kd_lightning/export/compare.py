"""Whether a file does what the network does, and where it does not."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.export.batches import part, tensors
from kd_lightning.export.sessions import Session, open_session
from kd_lightning.outputs import Outputs, run
from kd_lightning.tasks import Batch, Task


def in_two_batches(session: Session, batch: Batch) -> Tensor:
    """Return logits from a batch of one and one of the rest: the file was traced with two."""
    count = len(tensors(batch)[0])
    parts = [part(batch, slice(0, 1)), part(batch, slice(1, None))] if count > 1 else [batch]
    return torch.cat([session(some)[0].float() for some in parts])


class Comparison(NamedTuple):
    """Of a file with the network, on the example.

    Attributes:
        agreement: Mean over the samples, tokens or pixels, in [0, 1], as the task tells it.
        max_difference: Of a logit.
        finite: Whether all logits of the file are numbers.
    """

    agreement: float
    max_difference: float
    finite: bool


def compare(expected: Tensor, got: Tensor, task: Task) -> Comparison:
    answers = (task.answers(task.arranged(Outputs(logits))) for logits in (expected, got))
    finite = bool(torch.isfinite(got).all())
    return Comparison(float(task.agreement(*answers).mean()), float((got - expected).abs().max()), finite)


def worst_layer(network: nn.Module, batch: Batch, path: Path, runtime: str, layers: Mapping[str, str]) -> str:
    """Say at which layer the file departs most from the network: where the relative difference grows most.

    Args:
        network: In eval mode.
        batch: For both.
        path: Of the file.
        runtime: See :func:`~kd_lightning.export.sessions.open_session`.
        layers: Names of their outputs in the file, in the order of execution.
    """
    expected = _outputs(network, batch, layers)
    named = {layer: value for layer, value in layers.items() if layer in expected}
    if not named:
        return "no layer of the network is found in the file"
    values = list(dict.fromkeys(named.values()))
    found = dict(zip(values, open_session(path, runtime, values)(batch), strict=True))
    worst, grown, before = ("", 0.0), -float("inf"), 0.0
    for layer, value in named.items():
        if found[value].shape != expected[layer].shape:
            continue
        difference = _difference(expected[layer], found[value])
        if difference - before > grown:
            worst, grown = (layer, difference), difference - before
        before = difference
        if difference == float("inf"):
            return f"the first layer with values that are no numbers is {layer!r}"
    return f"it departs most at layer {worst[0]!r}, by {worst[1]:.2g} of the norm of the output"


def _difference(expected: Tensor, got: Tensor) -> float:
    relative = float((got.float() - expected).norm() / expected.norm().clamp(min=1e-12))
    return relative if relative < float("inf") else float("inf")


def _outputs(network: nn.Module, batch: Batch, layers: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the last output of each of the layers, where that is a tensor."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            found[name] = output.detach().clone()

    modules = dict(network.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _module, _input, output, name=name: keep(name, output))
        for name in layers
        if name in modules
    ]
    try:
        run(network, batch.args, batch.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
