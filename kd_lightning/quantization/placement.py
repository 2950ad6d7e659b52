"""Where activations are quantised, so that a runtime finds integers on both sides of each convolution.

The network is traced to find out what follows what; it is never rewritten.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from kd_lightning.quantization.layers import QuantizedLayer, gives_products, kind_of
from kd_lightning.quantization.quantizers import Quantizer

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RECTIFIERS = (nn.ReLU, nn.ReLU6)
# What leaves each value as it is: what was quantised before is so after.
_PASSING: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_PASSING_CALLS: tuple[Any, ...] = (
    *(F.dropout, F.dropout2d, F.max_pool1d, F.max_pool2d, torch.flatten, torch.reshape, torch.squeeze),
    *(torch.unsqueeze, torch.permute, torch.transpose),
)
_PASSING_METHODS = ("flatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose", "contiguous")
_RECTIFYING: Mapping[Any, float | None] = {F.relu: None, torch.relu: None, "relu": None, "relu_": None, F.relu6: 6.0}

_AT_MOST = 200  # characters of somebody else's message


@dataclass
class Placement:
    """Names of modules.

    Attributes:
        inputs: Layers whose input is to be quantised.
        outputs: Modules whose output is to be, with what a functional activation after it cuts off.
        folds: Batch norm by the layer before it, into which it can be folded.
        products: Linear layers whose output stays in float.
        notes: By layer, what stays in float there, and why.
    """

    inputs: set[str] = field(default_factory=set)
    outputs: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    folds: dict[str, str] = field(default_factory=dict)
    products: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, QuantizedLayer | Quantizer | nn.MultiheadAttention) or kind_of(m) is not None
        if any(kind_of(child) for child in m.modules()) and not known:
            return False  # torch's own blocks, such as TransformerEncoderLayer, are looked into
        return known or super().is_leaf_module(m, module_qualified_name)


def place(network: nn.Module, layers: set[str]) -> Placement:
    """Find the places for these layers, by tracing; at the layers' inputs alone where that cannot be done."""
    try:
        with _without_hooks(network):
            graph = _Tracer().trace(network)
    except Exception as error:  # whatever a forward does with what is no tensor
        first_sentence = " ".join(str(error).split()).partition(". ")[0]
        why = f"{type(error).__name__}: {first_sentence[:_AT_MOST]}"
        reason = f"the network cannot be traced ({why}), so its output stays in float"
        linear = {name for name, m in network.named_modules() if name in layers and gives_products(m)}
        return Placement(inputs=set(layers), products=linear, notes=dict.fromkeys(layers - linear, reason))
    return _Placing(network, graph, layers).place()


@contextmanager
def _without_hooks(network: nn.Module) -> Iterator[None]:
    """Trace no hooks: they may keep what they see, and that are no tensors."""
    kept = [(module, module._forward_hooks, module._forward_pre_hooks) for module in network.modules()]
    try:
        for module, _, _ in kept:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, after, before in kept:
            module._forward_hooks, module._forward_pre_hooks = after, before


class _Placing:
    def __init__(self, network: nn.Module, graph: fx.Graph, layers: set[str]) -> None:
        self.modules = dict(network.named_modules())
        self.names = {id(module): name for name, module in self.modules.items()}
        self.nodes, self.layers = list(graph.nodes), layers
        self.calls = Counter(self._name(node) for node in self.nodes if node.op == "call_module")
        self.done: set[fx.Node] = set()  # whose values are on a grid
        self.placement = Placement()

    def place(self) -> Placement:
        for node in self.nodes:
            if self._is(node, _RECTIFIERS) and self._once(node) and self._matters(node):
                self._quantize(node, node, *self._cut(node))
        for node in self.nodes:
            if self._is_layer(node):
                self._tail(node)
        for node in self.nodes:
            if self._is_layer(node) and not self._on_grid(node.args[0] if node.args else None):
                self.placement.inputs.add(self._name(node))
        for name in self.layers - set(self.calls):
            self.placement.notes[name] = "forward does not call it"
        return self.placement

    def _tail(self, node: fx.Node) -> None:
        """Quantise the end of layer, batch norm and activation."""
        name, end = self._name(node), node
        if not self._once(node):
            if gives_products(self.modules[name]):
                self.placement.products.add(name)
            else:
                self.placement.notes[name] = f"called {self.calls[name]} times, so its output stays in float"
            return
        after = self._only_user(node)
        if after is not None and self._is(after, NORMS) and self._once(after):
            self.placement.folds[name] = self._name(after)
            end, after = after, self._only_user(after)
        if after is not None and after in self.done:
            return
        if gives_products(self.modules[name]) and (after is None or self._rectifies(after) is None):
            self.placement.products.add(name)  # which may give floats
            return
        if after is not None and (cut := self._rectifies(after)) is not None:
            # No module to hang a quantiser on: the one before it cuts off the same.
            self._quantize(end, after, *cut)
            return
        self._quantize(end, end)

    def _quantize(
        self, module: fx.Node, value: fx.Node, lower: float | None = None, upper: float | None = None
    ) -> None:
        self.placement.outputs[self._name(module)] = (lower, upper)
        self.done.add(value)

    def _on_grid(self, value: Any) -> bool:
        while isinstance(value, fx.Node) and value not in self.done and self._passes(value) and value.args:
            value = value.args[0]
        return value in self.done

    def _matters(self, node: fx.Node) -> bool:
        """Whether anything but layers that are to stay in float gets it."""
        for user in node.users:
            if self._passes(user):
                if self._matters(user):
                    return True
            elif user.op != "output" and not (self._is_kind(user) and not self._is_layer(user)):
                return True
        return False

    def _passes(self, node: fx.Node) -> bool:
        return (
            self._is(node, _PASSING)
            or (node.op == "call_function" and any(node.target is call for call in _PASSING_CALLS))
            or (node.op == "call_method" and node.target in _PASSING_METHODS)
        )

    def _rectifies(self, node: fx.Node) -> tuple[float, float | None] | None:
        if self._is(node, _RECTIFIERS):  # called several times, or it had a quantiser of its own
            return self._cut(node)
        if node.op in ("call_function", "call_method"):
            for call, upper in _RECTIFYING.items():
                if node.target is call or (isinstance(call, str) and node.target == call):
                    return 0.0, upper
        return None

    def _cut(self, node: fx.Node) -> tuple[float, float | None]:
        return 0.0, 6.0 if isinstance(self.modules[str(node.target)], nn.ReLU6) else None

    def _is(self, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], kinds)

    def _is_kind(self, node: fx.Node) -> bool:
        return node.op == "call_module" and kind_of(self.modules[str(node.target)]) is not None

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and self._name(node) in self.layers

    def _once(self, node: fx.Node) -> bool:
        return self.calls[self._name(node)] == 1

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def _name(self, node: fx.Node) -> str:
        """Return the module's first name, where it has several."""
        name: str = self.names[id(self.modules[str(node.target)])]
        return name
