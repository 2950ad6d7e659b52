"""From a network to the graph of an ONNX file."""

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from kd_lightning.export.batches import Positional, input_names, tensors, two
from kd_lightning.quantization.state import PARTS
from kd_lightning.tasks.batch import Batch

if TYPE_CHECKING:
    import onnx_ir as ir

_QUANTIZER = re.compile(rf"\.({'|'.join(PARTS)})$")
OPSET = 21
"""The first with 4-bit integers; ONNX Runtime 1.18 reads it."""


def to_onnx(
    network: nn.Module, batch: Batch, layers: Sequence[str] = (), dtype: torch.dtype | None = None
) -> "ir.Model":
    """Trace a network in eval mode, for batches of any size of samples with the shape of these.

    The outputs are ``logits``, and the layers by name.

    Raises:
        ValueError: For what has no operator in ONNX, or cannot be traced.
    """
    batch = two(batch)
    module, inputs = Positional(network, batch, layers, dtype).eval(), tensors(batch)
    try:
        with quietly("torch.onnx"):
            program = torch.onnx.export(
                module,
                inputs,
                input_names=input_names(batch),
                output_names=["logits", *layers],
                dynamic_shapes=(tuple({0: "batch"} for _ in inputs),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise cannot_be_written(network, "ONNX", error) from error
    assert program is not None
    return program.model


def layers_of(model: "ir.Model") -> dict[str, str]:
    """Return the name of each layer's output in the graph, in the order of execution; before :func:`clear`.

    Of layers alone: a module with others inside may end with a node of one of these.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        inner = [scope.removeprefix("network.") for scope in scopes if scope.startswith("network.")]
        if inner and node.outputs[0].name:
            layer = _QUANTIZER.sub("", inner[-1])
            found.pop(layer, None)
            found[layer] = node.outputs[0].name
    return {name: x for name, x in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def clear(model: "ir.Model") -> None:
    """Take off stack traces: they weigh as much as the weights of a small network, and tell paths of this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def cannot_be_written(network: nn.Module, what: str, error: Exception) -> ValueError:
    """Return the error that says which operator or statement it is that fails."""
    lines = [line.strip() for cause in _causes(error) for line in str(cause).splitlines() if line.strip()]
    telling = ("No ONNX function found", "Could not guard", "data-dependent", "Constraints violated", "specialized")
    best = next((line for word in telling for line in lines if word in line), lines[-1] if lines else repr(error))
    return ValueError(
        f"{type(network).__name__} cannot be written as {what}: expected operators that it has, and a forward without "
        f"Python decisions on values or on the batch size; got: {best[:300]}; replace that in the network"
    )


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return the chain of causes, the first one first."""
    found: list[BaseException] = []
    while error is not None:
        found.insert(0, error)
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def quietly(name: str) -> Iterator[None]:
    """Keep a logger and warnings still, such as those of operators from packages the network has nothing to do with."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
