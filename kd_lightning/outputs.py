"""Call a network and take named layers' outputs along."""

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Samples(NamedTuple):
    """Which samples of a data set a batch holds.

    Attributes:
        ids: int64 (B,), from 0 to total − 1.
        total: How many samples the data set has.
    """

    ids: Tensor
    total: int


class TopK(NamedTuple):
    """A teacher's k best classes, in the place of its logits: all that an API tells, or that is stored.

    What the others have together, the tail mass, is what the k leave of 1; see
    :func:`~kd_lightning.losses.missing_mass`.

    Attributes:
        indices: Integers (B, k), (B, S, k) or (B, H, W, k): different classes, in any order.
        log_probs: Of the same shape, the log-probabilities at T = 1; −∞ fills up where there are fewer, with
            any class, such as -1.
    """

    indices: Tensor
    log_probs: Tensor


class Members(NamedTuple):
    """What the members of an ensemble gave, of which the average depends on the temperature.

    Attributes:
        logits: One tensor for each, of one shape.
        weights: Of the average; their sum is 1.
    """

    logits: tuple[Tensor, ...]
    weights: tuple[float, ...]

    def mixed(self, temperature: float = 1.0) -> Tensor:
        """Return T·log Σ_k w_k·softmax(z_k / T): logits whose softmax at T is the average of the probabilities at T.

        In float32 where the members' are in half precision.
        """
        total: Tensor | None = None
        for z, weight in zip(self.logits, self.weights, strict=True):
            if weight:
                z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
                log_p = torch.log_softmax(z / temperature, class_dim(z)) + math.log(weight)
                total = log_p if total is None else torch.logaddexp(total, log_p)
        assert total is not None
        return temperature * total


class Outputs(NamedTuple):
    """What a network gave for one batch.

    Attributes:
        logits: (B, C), (B, S, V) for language models, or (B, C, H, W) for a class at each pixel; without a class in
            the last dimension, (B, 0), (B, S, 0) or (B, H, W, 0), where ``top_k`` is all that is known.
        features: Outputs of the tapped layers, by their names in ``network.named_modules()``.
        samples: Which samples these are the outputs of, where the batch says so (the student's outputs only).
        top_k: The best classes of a teacher whose logits are not known.
        members: Of an ensemble; ``logits`` are those of their average at T = 1.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = {}
    samples: Samples | None = None
    top_k: TopK | None = None
    members: Members | None = None

    @classmethod
    def of_top_k(cls, indices: Tensor, log_probs: Tensor, features: Mapping[str, Tensor] | None = None) -> "Outputs":
        """Return the outputs of a teacher of which the k best classes are known; see :class:`TopK`.

        Raises:
            ValueError: Unless both have the same shape, and a class at least.
        """
        if indices.shape != log_probs.shape or indices.ndim < 2 or indices.shape[-1] < 1:
            raise ValueError(
                f"expected indices and log-probabilities (..., k) of one shape, got {tuple(indices.shape)} and "
                f"{tuple(log_probs.shape)}"
            )
        return cls(log_probs[..., :0], features or {}, top_k=TopK(indices.long(), log_probs))

    def softened(self, temperature: float | Tensor | None) -> "Outputs":
        """Return the outputs for a loss of that temperature: an ensemble's logits are others at another T."""
        if self.members is None or temperature is None or float(temperature) == 1:
            return self
        return self._replace(logits=self.members.mixed(float(temperature)))

    def best(self) -> Tensor:
        """Return the most likely class: (B,), (B, S) or (B, H, W)."""
        if self.top_k is None:
            return classes_last(self.logits).argmax(-1)
        place = self.top_k.log_probs.argmax(-1, keepdim=True)
        return self.top_k.indices.gather(-1, place).squeeze(-1)


def class_dim(logits: Tensor) -> int:
    """Return the dimension of the classes: 1 for dense logits (B, C, H, W), else the last."""
    return 1 if logits.ndim > 3 else -1


def classes_last(logits: Tensor) -> Tensor:
    """Return logits with the classes in the last dimension."""
    return logits.movedim(class_dim(logits), -1)


def run(network: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any], layers: Iterable[str] = ()) -> Outputs:
    """Call ``network(*args, **kwargs)``; see :func:`capture` for the layers."""
    with capture(network, layers) as features:
        output = network(*args, **kwargs)
    return Outputs(logits_of(output), features)


def logits_of(output: Any) -> Tensor:
    """Return the logits in a network's output: a tensor, or an object or mapping with ``logits``.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"expected the network to return its logits as a tensor, or an object with .logits, got "
        f"{type(output).__name__}: wrap the network in a module whose forward returns the logits"
    )


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """Return the submodule of that name.

    Raises:
        ValueError: When there is none; names the nearest ones.
    """
    try:
        return network.get_submodule(name)
    except AttributeError:
        nearest = ", ".join(nearest_layers(network, name))
        raise ValueError(
            f"{type(network).__name__} has no layer {name!r}: expected a name of named_modules(); nearest: {nearest}"
        ) from None


def nearest_layers(network: nn.Module, name: str, count: int = 6) -> list[str]:
    """Return the layer names that look most like ``name``, best first."""
    names = [n for n, _ in network.named_modules() if n]
    return difflib.get_close_matches(name, names, n=count, cutoff=0.0)


@contextmanager
def capture(network: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the named layers while the context lives; the hooks go with it.

    Raises:
        ValueError: For an unknown layer.
        RuntimeError: When a layer ran not once but never or several times, or when a later layer overwrote its
            output in place.
        TypeError: When a layer returns something else than a tensor.
    """
    _let_compiled_networks_see_hooks()
    found: dict[str, Tensor] = {}
    versions: dict[str, int] = {}

    def take(name: str, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {name!r} returns {type(output).__name__}, expected a tensor: name a layer inside it that does"
            )
        if name in found:
            raise RuntimeError(
                f"layer {name!r} ran several times in one forward pass, expected once: a module that is shared "
                "between places cannot be tapped; name a layer that runs once"
            )
        found[name] = output
        versions[name] = output._version

    with ExitStack() as hooks:
        for name in dict.fromkeys(layers):
            layer = find_layer(network, name)
            # The hook stays out of compiled graphs: a graph would go on writing to the first call's dictionary.
            hook: Callable[..., None] = torch.compiler.disable(  # type: ignore[no-untyped-call]
                lambda _module, _input, output, name=name: take(name, output)
            )
            hooks.enter_context(layer.register_forward_hook(hook))
        yield found

    for name in dict.fromkeys(layers):
        if name not in found:
            compiled = any(module._compiled_call_impl is not None for module in network.modules())
            stale = ", or, as the network is compiled, call torch.compiler.reset() after earlier calls of it"
            raise RuntimeError(
                f"layer {name!r} did not run in the forward pass: name a layer that the output needs"
                f"{stale if compiled else ''}"
            )
        if found[name]._version != versions[name]:
            raise RuntimeError(
                f"the output of layer {name!r} was overwritten in place by a later layer (an in-place ReLU?): "
                "tap that later layer, or set its inplace=False"
            )


def _let_compiled_networks_see_hooks() -> None:
    # By default a network that was compiled without hooks never calls those that are added later, as torch.compile's
    # manual says under "Hooks on nn.Module": a tap after an untapped call would stay empty.
    dynamo = sys.modules.get("torch._dynamo")  # not there where nothing is compiled; importing it takes a second
    if dynamo is not None and dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
