"""Leave a network's head out of a forward pass whose logits nobody reads."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.outputs import find_layer, let_compiled_networks_see_hooks


@contextmanager
def idle(network: nn.Module | None, heads: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Let heads return no logits, (..., 0), while the context lives; the hooks go with it.

    What a head gets instead of its input is none of the tokens: its own forward takes no time, and whatever else hangs
    on its call (hooks, a compiled graph) works as ever.

    Args:
        network: Has the heads; None where there is none to call.
        heads: Their names.

    Yields:
        The input of each head that ran, by name.

    Raises:
        ValueError: For an unknown head.
    """
    inputs: dict[str, Tensor] = {}

    def before(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise ValueError(f"the head {name!r} was called without a positional argument, expected its input as one")
        hidden, *others = args
        inputs[name] = hidden
        return hidden.flatten(0, -2)[:0], *others

    def after(name: str, output: Tensor) -> Tensor:
        return output.new_zeros(*inputs[name].shape[:-1], 0)

    with ExitStack() as hooks:
        for name in heads if network is not None else ():
            let_compiled_networks_see_hooks()
            assert network is not None
            head = find_layer(network, name)
            # Out of compiled graphs, which would go on writing to the first call's dictionary.
            enter = torch.compiler.disable(lambda _module, args, name=name: before(name, args))  # type: ignore[no-untyped-call]
            leave = torch.compiler.disable(lambda _module, _args, output, name=name: after(name, output))  # type: ignore[no-untyped-call]
            hooks.enter_context(head.register_forward_pre_hook(enter))
            hooks.enter_context(head.register_forward_hook(leave))
        yield inputs
