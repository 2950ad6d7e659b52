"""Where in a network its logits are: in its output, in a part of that, or in a layer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.outputs import find_layer, nearest_layers, usual_logits
from kd_lightning.selection import Selector, check_selector, describe, has_part, select

_LAYER, _OUTPUT = "layer:", "output:"


@dataclass(frozen=True)
class LogitsPlace:
    """Where a network's logits are.

    A word may be the name of a layer and that of a part of the output. It is looked up in both, and refused where they
    are different tensors; ``"layer:<name>"`` and ``"output:<name>"`` say which is meant.

    Args:
        selector: Name of a layer, or else a key, attribute or index of the output, or a function of it; None for the
            output itself, or its ``logits`` or ``prediction``.
        argument: The argument that says so, for errors.
        borrowed: Whether it was said of another network. One that returns its logits and nothing else, or has no such
            part, gives them as if nothing were said.

    Raises:
        TypeError: For a selector of another kind.
    """

    selector: Selector | None = None
    argument: str = "logits"
    borrowed: bool = False

    def __post_init__(self) -> None:
        check_selector(self.argument, self.selector)

    def layer_in(self, network: nn.Module) -> str | None:
        """Return the name of the layer whose output they are, None where they are in the network's own output.

        Raises:
            ValueError: For ``"layer:<name>"`` without such a layer.
        """
        if not isinstance(self.selector, str):
            return None
        if self.selector.startswith(_LAYER):
            name = self.selector.removeprefix(_LAYER)
            find_layer(network, name)
            return name
        return self.selector if self.selector and _has_layer(network, self.selector) else None

    def read(self, output: Any, network: nn.Module) -> Tensor:
        """Return the logits in what the network, or the layer, returned.

        Raises:
            ValueError: When they are not there, or no tensor of several samples; says what there is.
        """
        selector = None if self.layer_in(network) is not None else self._of_output
        if selector is not None:
            if isinstance(selector, str) and not has_part(output, selector):
                raise ValueError(
                    f"{type(network).__name__} has no layer {selector!r}, expected {self.argument}= to be a name of "
                    f"named_modules(); nearest: {', '.join(nearest_layers(network, selector))}. No part of its output "
                    f"has that name, either, which is {describe(output)}"
                )
            logits = select(output, selector, self.argument)
        else:
            usual = None if isinstance(output, Tensor) else usual_logits(output)
            logits = output if usual is None else usual
        if isinstance(logits, Tensor) and logits.ndim:
            return logits
        if selector is None:
            raise ValueError(
                f"expected {type(network).__name__} to return its logits as a tensor, or an object with .logits or "
                f".prediction, got {describe(output)}: name the part that they are with {self.argument}=, a key, an "
                "attribute, an index or a function of the output"
            )
        raise ValueError(
            f"expected {self.argument}={self._named} to give the logits, a tensor with one row a sample, got "
            f"{describe(logits)}, out of {describe(output)}"
        )

    def check_unambiguous(self, output: Any, of_layer: Any) -> None:
        """Raise ValueError where a word names a layer and, with other values, a part of the network's output."""
        word = self.selector
        if not isinstance(word, str) or word.startswith(_LAYER) or not has_part(output, word):
            return
        part = select(output, word, self.argument)
        if part is of_layer or (
            isinstance(part, Tensor)
            and isinstance(of_layer, Tensor)
            and part.shape == of_layer.shape
            and torch.equal(part, of_layer)
        ):
            return
        raise ValueError(
            f"{self.argument}={word!r} names a layer, which gives {describe(of_layer)}, and a part of the output, "
            f'{describe(part)}: pass {self.argument}="{_LAYER}{word}" or "{_OUTPUT}{word}"'
        )

    @contextmanager
    def alone(self, network: nn.Module, needed: bool = True) -> Iterator[None]:
        """Let a network return its logits and nothing else while the context lives.

        Args:
            network: That is called.
            needed: Whether a network that gives none is refused; it returns no values then, (0, 0).

        Raises:
            ValueError: When it is called, and they are not there.
        """
        layer, of_layer = self.layer_in(network), list[Any]()

        def from_output(_module: nn.Module, _args: Any, output: Any) -> Tensor:
            try:
                return taken(output)
            except ValueError:
                if needed:
                    raise
                of_layer.clear()
                return next((p.new_zeros(0, 0) for p in network.parameters()), torch.zeros(0, 0))

        def taken(output: Any) -> Tensor:
            if self.borrowed and not self._is_in(output, layer):
                of_layer.clear()
                return LogitsPlace(None, self.argument).read(output, network)
            if layer is None:
                return self.read(output, network)
            if len(of_layer) != 1:
                often = "several times" if of_layer else "never"
                raise ValueError(
                    f"the layer {layer!r}, named by {self.argument}=, ran {often} in {type(network).__name__}, "
                    "expected once: name one that does, or a part of the output"
                )
            given = of_layer.pop()
            self.check_unambiguous(output, given)
            return self.read(given, network)

        with ExitStack() as hooks:
            if layer is not None:
                note = torch.compiler.disable(lambda _module, _args, output: of_layer.append(output))  # type: ignore[no-untyped-call]
                hooks.enter_context(find_layer(network, layer).register_forward_hook(note))
            # First of all hooks, so that those of others see the logits, too.
            hook = torch.compiler.disable(from_output)  # type: ignore[no-untyped-call]
            hooks.enter_context(network.register_forward_hook(hook, prepend=True))
            yield

    def _is_in(self, output: Any, layer: str | None) -> bool:
        """Tell whether what was said of another network can be meant of this one, too."""
        if isinstance(output, Tensor):
            return False
        if layer is not None:
            return usual_logits(output) is None
        part = self._of_output
        return part is None or callable(part) or has_part(output, part)

    @property
    def _of_output(self) -> Selector | None:
        return (self.selector.removeprefix(_OUTPUT) or None) if isinstance(self.selector, str) else self.selector

    @property
    def _named(self) -> str:
        return repr(self.selector) if isinstance(self.selector, str | int) else "<function>"


def _has_layer(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True
