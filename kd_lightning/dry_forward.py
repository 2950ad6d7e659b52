"""Run a network before the training, without a trace left in it."""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from kd_lightning.first_batches import untouched_rng
from kd_lightning.outputs import Outputs, nearest_layers, run
from kd_lightning.selection import describe


def dry_forward(
    role: str,
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layers: Iterable[str],
    with_graph: bool = False,
) -> Outputs:
    """Run a network in eval mode, without a trace left in it.

    Args:
        role: Of the network, for errors.
        network: Anything that is called with the arguments.
        args: Positional ones.
        kwargs: By name.
        layers: Whose outputs are wanted.
        with_graph: Whether the outputs have the graph of their computation.

    Raises:
        ValueError: For an unknown layer (nearest names and their output shapes are listed), or inputs that the network
            cannot take.
    """
    known = dict(network.named_modules())
    unknown = [name for name in layers if name not in known]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with untouched_rng(), uncompiled(), torch.set_grad_enabled(with_graph):
            parameter = next(network.parameters(), None)
            if parameter is not None:
                args, kwargs = (_fit(x, parameter) for x in (args, kwargs))
            try:
                if unknown:
                    raise unknown_layer(
                        role, network, unknown[0], lambda: network(*args, **kwargs), len(args[0]) if args else "some"
                    )
                return run(network, args, kwargs, layers)
            except (RuntimeError, TypeError, LookupError, AttributeError) as error:
                if "layer '" in str(error):  # of the capture: names the layer and the remedy already
                    raise ValueError(f"{role}: {error}") from error
                own = ", or name inputs of its own with Distillation(..., teacher_inputs=)" if role != "student" else ""
                raise ValueError(
                    f"the {role} {type(network).__name__} cannot take {_inputs(args, kwargs)}: "
                    f"{_first_line(error)}; expected inputs as the network was made for: check channels, image "
                    f"size and the data module{own}"
                ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def uncompiled() -> AbstractContextManager[object]:
    """Run compiled networks as they were written.

    Compiled for a few samples first, they would be compiled again at the first step: for any number, and slower.
    """
    eager: AbstractContextManager[object] = nullcontext()
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        eager = torch.compiler.set_stance("force_eager")
    return eager


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    given = (*args, *kwargs.values())
    if given and all(isinstance(x, Tensor) for x in given):
        return f"a batch of shape {', '.join(str(tuple(x.shape)) for x in given)}"
    named = [*map(describe, args), *(f"{name}= {describe(x)}" for name, x in kwargs.items())]
    return " and ".join(named) or "no inputs"


def _first_line(error: Exception) -> str:
    said = str(error).partition("\n")[0]
    return said if isinstance(error, RuntimeError | TypeError | IndexError) else f"{type(error).__name__}: {said}"


def _fit(data: Any, parameter: Tensor) -> Any:
    """Put data where a network is, floating-point inputs in its precision."""

    def move(x: Tensor) -> Tensor:
        return x.to(parameter.device, parameter.dtype if x.is_floating_point() else None)

    return apply_to_collection(data, Tensor, move)


def unknown_layer(
    role: str, network: nn.Module, name: str, forward: Callable[[], object], samples: object = "some"
) -> ValueError:
    """Return the error for a layer that is not there: with the nearest names, and their shapes in ``forward()``."""
    shapes: dict[str, str] = {}

    def note(layer: str, output: Any) -> None:
        shapes[layer] = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__

    hooks = [
        module.register_forward_hook(lambda _module, _input, output, layer=layer: note(layer, output))
        for layer, module in network.named_modules()
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    nearest = ", ".join(f"{layer} {shapes.get(layer, '(did not run)')}" for layer in nearest_layers(network, name))
    return ValueError(
        f"the {role} {type(network).__name__} has no layer {name!r}, expected a name of named_modules(); nearest, with "
        f"their outputs for {samples} samples: {nearest}"
    )
