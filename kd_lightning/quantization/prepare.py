"""From a network to one that fake-quantises, in place."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from kd_lightning.outputs import run
from kd_lightning.quantization.layers import (
    QUANTIZED,
    QuantizedConv1D,
    QuantizedEmbedding,
    QuantizedLayer,
    kind_of,
    quantized_kind,
    swap,
)
from kd_lightning.quantization.placement import Placement, place
from kd_lightning.quantization.quantizers import ActivationQuantizer, Quantizer
from kd_lightning.quantization.spec import QuantizationSpec
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.batch import check_numbers

_KINDS: dict[type[nn.Module], str] = {quantized: kind.__name__ for kind, quantized in QUANTIZED.items()}
_KINDS |= {QuantizedConv1D: "Conv1D", QuantizedEmbedding: "Embedding"}
_SPEC, _PLACEMENT = "quantization_spec", "quantization_placement"


class LayerReport(NamedTuple):
    """How one convolution, linear layer or quantised embedding is stored and computed.

    Attributes:
        name: In the network.
        kind: Its class before.
        weight_bits: 32 for one that stays in float.
        activation_bits: Of its input, likewise.
        note: What stays in float there, and why; empty for nothing.
    """

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    note: str


class Share(NamedTuple):
    """How many parameters are quantised.

    Attributes:
        quantized: Those that are stored in few bits.
        total: All of the network's.
        in_float: The others by what they belong to, such as ``LayerNorm``; ``bias`` of quantised layers. Most first.
    """

    quantized: int
    total: int
    in_float: dict[str, int]


def prepare(network: nn.Module, spec: QuantizationSpec | None = None) -> nn.Module:
    """Make a network one that can fake-quantise, in place: names, parameters and hooks stay.

    Quantisers are off at first, and watch what comes along in training mode. To train, see
    :class:`~kd_lightning.callbacks.QuantizationAwareTraining`; without training, :func:`calibrate`.

    Returns:
        The same network.

    Raises:
        ValueError: For a network without a layer to quantise, that is prepared already, or a name in ``skip`` that
            is none of its modules.
    """
    spec = spec if spec is not None else QuantizationSpec()
    if is_prepared(network):
        raise ValueError("expected a float network, got one that is prepared already: prepare it once")
    layers = _layers(network, spec)
    modules = dict(network.named_modules())
    placement = place(network, {name for name in layers if not isinstance(modules[name], nn.Embedding)})
    if spec.activation_bits is None:
        placement.inputs, placement.outputs = set(), {}
    for name in layers:
        swap(modules[name], spec, name in placement.inputs)
    for name, (lower, upper) in placement.outputs.items():
        module = modules[name]
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        module.output_quantizer = ActivationQuantizer(spec, lower, upper).to(device).train(module.training)
        module.register_forward_hook(_quantize_output)
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoderLayer):
            # In eval mode it computes with its layers' weights in one call, unless it has hooks.
            module.register_forward_pre_hook(_call_the_layers)
    setattr(network, _SPEC, spec)
    setattr(network, _PLACEMENT, placement)
    return network


def is_prepared(network: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLayer) for module in network.modules())


def spec_of(network: nn.Module) -> QuantizationSpec:
    """Return what a network was prepared with."""
    return _found(network, _SPEC)  # type: ignore[no-any-return]


def placement_of(network: nn.Module) -> Placement:
    return _found(network, _PLACEMENT)  # type: ignore[no-any-return]


def set_fake_quantization(network: nn.Module, enabled: bool) -> None:
    """Switch rounding on or off, everywhere."""
    for quantizer in quantizers(network).values():
        quantizer.enabled = enabled


def set_observers(network: nn.Module, observing: bool) -> None:
    """Let ranges follow the data in training mode, or stay."""
    for quantizer in quantizers(network).values():
        quantizer.observing = observing


@torch.no_grad()
def calibrate(
    network: nn.Module, loader: Iterable[Any], batches: int | None = None, task: Task | None = None
) -> nn.Module:
    """Set the ranges of activations from data, in eval mode, and switch rounding on (post-training quantisation).

    Args:
        network: That is prepared.
        loader: Batches as :class:`~kd_lightning.tasks.Task` reads them; labels are not used.
        batches: At most; all unless given.
        task: Reads batches, if they are others.

    Returns:
        The same network.

    Raises:
        ValueError: For a network that is not prepared, no batches, NaN in one, and ranges that are no numbers or hold
            zero alone.
    """
    found = quantizers(network)
    activations = [q for q in found.values() if isinstance(q, ActivationQuantizer)]
    was_training = network.training
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    seen = 0
    set_fake_quantization(network, False)
    for quantizer in activations:
        quantizer.calibrating, quantizer.observed = True, False
        for buffer in (quantizer.low, quantizer.high, quantizer.count):
            buffer.zero_()  # also after a calibration that failed: a mean with NaN would stay NaN
    network.eval()
    try:
        for batch in islice(loader, batches):
            read = (task or Task()).read(move_data_to_device(batch, device))
            check_numbers(read, f"batch {seen} to calibrate with")
            run(network, read.args, read.kwargs)
            seen += 1
    finally:
        network.train(was_training)
        for quantizer in activations:
            quantizer.calibrating = False
    if not seen:
        raise ValueError("expected batches to calibrate with, got none: the loader is empty")
    set_observers(network, False)
    set_fake_quantization(network, True)
    check_ranges(network)
    return network


def check_ranges(network: nn.Module) -> None:
    """Raise ValueError where a range or a scale is not a number, or holds zero alone."""
    for name, quantizer in quantizers(network).items():
        where = name.rpartition(".")[0] or "the network"
        if isinstance(quantizer, ActivationQuantizer):
            low, high = float(quantizer.low), float(quantizer.high)
            if quantizer.observed and not (abs(low) < float("inf") and abs(high) < float("inf")):
                raise ValueError(
                    f"activations at {where!r} have the range {low:g} to {high:g}, expected numbers: look for what is "
                    "infinite or not a number in the data or the weights"
                )
            if quantizer.observed and low == high:
                raise ValueError(
                    f"activations at {where!r} are {low:g} throughout, expected a range: calibrate with data as in "
                    f"training, or leave the layer out with skip=({where!r},)"
                )
    for name, layer in _quantized(network):
        if not bool(torch.isfinite(layer.weight_quantizer.scales(layer.weight)).all()):
            raise ValueError(f"the weight of {name!r} has scales that are not numbers: the network has diverged")


def quantized_layers(network: nn.Module) -> list[LayerReport]:
    """Return all convolutions and linear layers of a network, and what becomes of them."""
    prepared = is_prepared(network)
    notes = placement_of(network).notes if prepared else {}
    report = []
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLayer):
            spec = spec_of(network)
            bits = None if isinstance(module, QuantizedEmbedding) else spec.activation_bits
            note = notes.get(name, "" if bits is not None else "activations stay in float")
            report.append(LayerReport(name, _KINDS[type(module)], spec.weight_bits, bits or 32, note))
        elif kind_of(module) is not None:
            kind = type(module).__name__
            why = "left out" if quantized_kind(module) is not None else f"{kind} has a forward of its own"
            report.append(LayerReport(name, kind, 32, 32, f"stays in float: {why}"))
        elif isinstance(module, nn.MultiheadAttention):
            why = "stays in float: it computes with weights of its own"
            report.append(LayerReport(name, type(module).__name__, 32, 32, why))
    return report


def quantized_share(network: nn.Module) -> Share:
    """Return how many of a network's parameters are quantised, and what the others are."""
    layers = [module for module in network.modules() if isinstance(module, QuantizedLayer)]
    quantized = {id(layer.weight): layer.weight.numel() for layer in layers}
    in_float: dict[str, int] = {}
    seen = set(quantized)
    for module in network.modules():
        if isinstance(module, Quantizer):
            continue  # learnt scales are none of the network's
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = name if isinstance(module, QuantizedLayer) else type(module).__name__
            in_float[kind] = in_float.get(kind, 0) + parameter.numel()
    most_first = dict(sorted(in_float.items(), key=lambda item: -item[1]))
    count = sum(quantized.values())
    return Share(count, count + sum(in_float.values()), most_first)


def quantizers(network: nn.Module) -> dict[str, Quantizer]:
    """Return all quantisers by name.

    Raises:
        ValueError: For a network that is not prepared.
    """
    if not is_prepared(network):
        raise ValueError("expected a prepared network, got one in float: call prepare(network) first")
    return {name: module for name, module in network.named_modules() if isinstance(module, Quantizer)}


def _quantized(network: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, QuantizedLayer))


def _layers(network: nn.Module, spec: QuantizationSpec) -> set[str]:
    embeddings = (nn.Embedding,) if spec.embeddings else ()
    names = [name for name, m in network.named_modules() if kind_of(m) is not None or isinstance(m, embeddings)]
    everything = {name for name, _ in network.named_modules(remove_duplicate=False)}
    ends = {"first": names[:1], "last": names[-1:]}
    skipped = set()
    for skip in spec.skip:
        if skip in ends and skip not in everything:
            skipped.update(ends[skip])
        elif skip not in everything:
            raise ValueError(
                f"skip names {skip!r}, which is no module of the network, expected 'first', 'last' or some of {names}"
            )
        else:
            skipped.update(name for name in names if name == skip or name.startswith(f"{skip}."))
    modules = dict(network.named_modules())
    layers = {name for name in names if quantized_kind(modules[name]) is not None and name not in skipped}
    if not layers:
        raise ValueError(
            f"expected a convolution or linear layer to quantise, got none of {len(names)} in {type(network).__name__}"
            + (f" with skip={spec.skip}" if spec.skip else "")
        )
    return layers


def _found(network: nn.Module, attribute: str) -> Any:
    for module in network.modules():  # the network itself, or what it wraps
        if attribute in vars(module):
            return vars(module)[attribute]
    raise ValueError("expected a prepared network, got one in float: call prepare(network) first")


def _call_the_layers(module: Any, args: Any) -> None:
    """Stand at module level, so that copies and pickles find it."""


def _quantize_output(module: Any, args: Any, output: Tensor) -> Tensor:
    """Stand at module level, so that copies and pickles find it."""
    quantized: Tensor = module.output_quantizer(output)
    return quantized
