"""Let a language model write a text on."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.draws import drawn
from kd_lightning.outputs import logits_of


@torch.no_grad()
def write(network: nn.Module, prompt: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Return prompts with the tokens that a causal language model writes after them.

    It runs in eval mode. Where its forward takes ``cache`` (:class:`~kd_lightning.models.GPT`) or ``past_key_values``
    (``transformers``), each token is computed once; any other network reads the whole text for each.

    Args:
        network: From tokens (B, S) to logits (B, S, V), or an object with ``.logits``.
        prompt: Of equal length: int64 (B, P), P from 1.
        uniform: Numbers in [0, 1) that draw the tokens: (B, n), for n of them.
        temperature: Of the distribution that they are drawn from; 0 takes the most likely token each time.

    Returns:
        int64 (B, P + n).
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1 or uniform.ndim != 2 or len(uniform) != len(prompt):
        raise ValueError(
            f"expected prompts (B, P) and numbers (B, n), P from 1, got {tuple(prompt.shape)} and "
            f"{tuple(uniform.shape)}"
        )
    if not temperature >= 0:
        raise ValueError(f"expected temperature >= 0, got {temperature}: 0 takes the most likely token")
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        text, read = prompt, _Reading(network)
        for place in range(uniform.shape[1]):
            logits = read(text).float()
            token = logits.argmax(-1) if temperature == 0 else drawn(logits / temperature, uniform[:, place])
            text = torch.cat([text, token[:, None]], 1)
    finally:
        for module, mode in modes:
            module.training = mode
    return text


def remembers(network: nn.Module) -> bool:
    """Tell whether a network computes each token of a text once while it writes."""
    return _name_of_cache(network) is not None


class _Reading:
    """Gives the logits of the next token; remembers what it has read where the network can."""

    def __init__(self, network: nn.Module) -> None:
        self._network, self._seen = network, 0
        self._name, self._of_transformers = _name_of_cache(network), hasattr(network, "can_generate")
        self._cache: Any = None if self._of_transformers else []

    def __call__(self, text: Tensor) -> Tensor:
        if self._name is None:
            return logits_of(self._network(text))[:, -1]
        new, self._seen = text[:, self._seen :], text.shape[1]
        given = {self._name: self._cache, **({"use_cache": True} if self._of_transformers else {})}
        output = self._network(new, **given)
        if self._of_transformers:
            self._cache = getattr(output, self._name)
        return logits_of(output)[:, -1]


def _name_of_cache(network: nn.Module) -> str | None:
    """Return the argument in which a network's keys and values come along; ``transformers`` has renamed its own."""
    takes = signature(network.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in takes), None)
