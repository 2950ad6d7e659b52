"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022), https://arxiv.org/abs/2106.09685."""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_NAME = "lora"
_HEADS = ("classifier", "score")


def add_lora(
    network: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Put an adapter of ``peft`` beside a network's layers, in place: W x + α/r · B A x (eq. 3); W is frozen.

    The network's ``state_dict``, and so its checkpoint, holds what is trained alone: A and B, and a classifier on top,
    which is trained with them. It loads, strictly, into a network that was made likewise on the same weights W.

    Args:
        network: A model of ``transformers``.
        r: Rank of B A.
        alpha: α.
        dropout: Of the adapter's input.
        target_modules: Ends of the names of layers, such as ``[q_proj, v_proj]``, or ``all-linear``; what peft takes
            for this architecture unless given.
        options: Further ones of ``peft.LoraConfig``.

    Returns:
        The network.

    Raises:
        ImportError: Without peft.
        ValueError: For layers that are not there.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            f"peft cannot be imported ({str(error).splitlines()[0]}), expected it for lora=: pip install "
            "'kd-lightning[peft]'"
        ) from error
    modules = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, **options)
    before = {id(value) for value in network.state_dict(keep_vars=True).values()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # it finds that out by itself
        peft.inject_adapter_in_model(config, network, adapter_name=_NAME)
    for name, module in network.named_children():
        if name in _HEADS:
            module.requires_grad_(True)
    state = network.state_dict(keep_vars=True)
    network.frozen_names = frozenset(  # type: ignore[assignment]
        name for name, value in state.items() if id(value) in before and not value.requires_grad
    )
    network.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
    network.register_load_state_dict_post_hook(_are_not_missing)  # type: ignore[no-untyped-call]
    return network


def merge_lora(network: nn.Module) -> nn.Module:
    """Add adapters to the weights that they are beside, in place, for serving: W + α/r · B A.

    The ``state_dict`` holds all weights then, by the names that they had without an adapter.
    """
    for name, module in list(network.named_modules()):
        if not hasattr(module, "lora_A") or not hasattr(module, "merge"):
            continue
        layer: Any = module
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(network, "frozen_names"):
        network.frozen_names = frozenset()  # type: ignore[assignment]
    return network


# Plain functions: torch sets an attribute on them, and copies and pickles of the network have them too.
def _leave_out(module: Any, state: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
    for name in module.frozen_names:
        state.pop(prefix + name, None)


def _are_not_missing(module: Any, incompatible: Any) -> None:
    # With a prefix where the network is part of another module.
    frozen = tuple(f".{name}" for name in module.frozen_names)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not f".{key}".endswith(frozen)]
