"""Call a network and take named layers' outputs along."""

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from kd_lightning.selection import describe, has_part, select

TOP_K_REMEDY = "take kd, forward_kl, top_k_kl or deit_hard, without standardize, or a teacher that gives its logits"


class Samples(NamedTuple):
    """Which samples of a data set a batch holds.

    Attributes:
        ids: int64 (B,), from 0 to total − 1.
        total: How many samples the data set has.
    """

    ids: Tensor
    total: int


class Outputs(NamedTuple):
    """What a network gave for one batch.

    Attributes:
        logits: (B, C), (B, S, V) for language models, or (B, C, H, W) for a class at each pixel. (B, 0) of a network
            that gives none, where no loss reads them.
        features: Outputs of the tapped layers, by their names in ``network.named_modules()``.
        samples: Which samples these are the outputs of, where the batch says so (the student's outputs only).
    """

    logits: Tensor
    features: Mapping[str, Tensor] = {}
    samples: Samples | None = None

    @property
    def members(self) -> tuple[Tensor, ...]:
        """Logits of an ensemble's members: none."""
        return ()

    def softened(self, temperature: float | Tensor | None) -> "Outputs":
        """Return the outputs for a loss of that temperature."""
        return self

    def best(self) -> Tensor:
        """Return the most likely class: (B,), (B, S) or (B, H, W)."""
        return classes_last(self.logits).argmax(-1)

    def with_logits(self, change: Callable[[Tensor], Tensor]) -> "Outputs":
        """Return the same with other logits, by a function of them."""
        return self._replace(logits=change(self.logits))

    def in_full_precision(self) -> "Outputs":
        """Return the same in float32, where it is in half precision."""
        return self.with_logits(_up)._replace(features=_all_up(self.features))


Average: TypeAlias = Callable[[Sequence[Tensor], Sequence[float], float], Tensor]
"""Makes one network's outputs of those of several, by weights, for a temperature."""


def mixed(members: Sequence[Tensor], weights: Sequence[float], temperature: float = 1.0) -> Tensor:
    """Return T·log Σ_k w_k·softmax(z_k / T): logits whose softmax at T is the average of the probabilities at T.

    In float32 where the members' are in half precision.
    """
    total: Tensor | None = None
    for z, weight in zip(members, weights, strict=True):
        if weight:
            z = _up(z)
            log_p = torch.log_softmax(z / temperature, class_dim(z)) + math.log(weight)
            total = log_p if total is None else torch.logaddexp(total, log_p)
    assert total is not None
    return temperature * total


class EnsembleOutputs(NamedTuple):
    """What an ensemble gave for one batch: an average that depends on the temperature.

    Attributes:
        logits: Those of the average at T = 1.
        members: Logits of each member, of one shape.
        weights: Of the average; their sum is 1.
        features: Those of the first member.
        average: Of the members, by weights, at a temperature; that of probabilities of classes unless a task has
            outputs of another meaning.
    """

    logits: Tensor
    members: tuple[Tensor, ...]
    weights: tuple[float, ...]
    features: Mapping[str, Tensor] = {}
    average: Average = mixed

    @classmethod
    def of(
        cls, members: Iterable[Tensor], weights: Iterable[float], features: Mapping[str, Tensor] | None = None
    ) -> "EnsembleOutputs":
        """Return the outputs of an ensemble with these members."""
        members, weights = tuple(members), tuple(weights)
        return cls(mixed(members, weights), members, weights, features or {})

    def softened(self, temperature: float | Tensor | None) -> Outputs:
        """Return the outputs for a loss of that temperature: an ensemble's logits are others at another T."""
        if temperature is None or float(temperature) == 1:
            return Outputs(self.logits, self.features)
        return Outputs(self.average(self.members, self.weights, float(temperature)), self.features)

    def averaged(self, average: Average) -> "EnsembleOutputs":
        """Return the same members with another average."""
        return self._replace(logits=average(self.members, self.weights, 1.0), average=average)

    def best(self) -> Tensor:
        """Return the most likely class, at T = 1: (B,), (B, S) or (B, H, W)."""
        return classes_last(self.logits).argmax(-1)

    def with_logits(self, change: Callable[[Tensor], Tensor]) -> "EnsembleOutputs":
        """Return the same with other logits of the average and of each member, by a function of them."""
        return self._replace(logits=change(self.logits), members=tuple(map(change, self.members)))

    def in_full_precision(self) -> "EnsembleOutputs":
        """Return the same in float32, where it is in half precision."""
        return self.with_logits(_up)._replace(features=_all_up(self.features))


class TopK(NamedTuple):
    """A teacher's k best classes, in the place of its logits: all that an API tells, or that is stored.

    What the others have together, the tail mass, is what the k leave of 1; see
    :func:`~kd_lightning.losses.missing_mass`.

    Attributes:
        indices: Integers (B, k), (B, S, k) or (B, H, W, k): different classes, in any order.
        log_probs: Of the same shape, the log-probabilities at T = 1; −∞ fills up where there are fewer, with
            any class, such as -1.
        features: Outputs of the teacher's layers, by name.
    """

    indices: Tensor
    log_probs: Tensor
    features: Mapping[str, Tensor] = {}

    @classmethod
    def of(cls, indices: Tensor, log_probs: Tensor, features: Mapping[str, Tensor] | None = None) -> "TopK":
        """Return what is known of a teacher, with class indices of any integer type.

        Raises:
            ValueError: Unless both have the same shape, and a class at least.
        """
        if indices.shape != log_probs.shape or indices.ndim < 2 or indices.shape[-1] < 1:
            raise ValueError(
                f"expected indices and log-probabilities (..., k) of one shape, got {tuple(indices.shape)} and "
                f"{tuple(log_probs.shape)}"
            )
        return cls(indices.long(), log_probs, features or {})

    @property
    def k(self) -> int:
        """How many classes are known."""
        return self.indices.shape[-1]

    @property
    def logits(self) -> Tensor:
        """Not known.

        Raises:
            ValueError: Whenever it is read.
        """
        raise ValueError(f"this reads the teacher's logits of all classes, got its {self.k} best: {TOP_K_REMEDY}")

    @property
    def members(self) -> tuple[Tensor, ...]:
        """Logits of an ensemble's members: none."""
        return ()

    def softened(self, temperature: float | Tensor | None) -> "TopK":
        """Return the outputs for a loss of that temperature, which softens them itself."""
        return self

    def best(self) -> Tensor:
        """Return the most likely class: (B,), (B, S) or (B, H, W)."""
        place = self.log_probs.argmax(-1, keepdim=True)
        return self.indices.gather(-1, place).squeeze(-1)

    def with_logits(self, change: Callable[[Tensor], Tensor]) -> "TopK":
        """Return the same: there are no logits."""
        return self

    def in_full_precision(self) -> "TopK":
        """Return the same in float32, where it is in half precision."""
        return self._replace(log_probs=_up(self.log_probs), features=_all_up(self.features))


class PeerOutputs(NamedTuple):
    """What networks gave for one batch that are trained along with the student, with the graphs of their computation.

    Attributes:
        networks: The outputs of each, by name.
        features: None.
        average: As of :class:`EnsembleOutputs`; by which several are scored as one.
    """

    networks: Mapping[str, Outputs]
    features: Mapping[str, Tensor] = {}
    average: Average = mixed

    @property
    def logits(self) -> Tensor:
        """Logits of their average at T = 1; of one, its own."""
        return self.softened(1.0).logits

    @property
    def members(self) -> tuple[Tensor, ...]:
        """Logits of each."""
        return tuple(one.logits for one in self.networks.values())

    def softened(self, temperature: float | Tensor | None) -> Outputs:
        """Return the outputs of their average, at a temperature; losses get them one by one."""
        if len(self.networks) == 1:
            return next(iter(self.networks.values()))
        weights = [1 / len(self.networks)] * len(self.networks)
        return Outputs(self.average(self.members, weights, 1.0 if temperature is None else float(temperature)))

    def averaged(self, average: Average) -> "PeerOutputs":
        """Return the same networks with another average."""
        return self._replace(average=average)

    def best(self) -> Tensor:
        """Return the most likely class of their average, at T = 1: (B,), (B, S) or (B, H, W)."""
        return self.softened(1.0).best()

    def with_logits(self, change: Callable[[Tensor], Tensor]) -> "PeerOutputs":
        """Return the same with other logits of each, by a function of them."""
        return self._replace(networks={name: one.with_logits(change) for name, one in self.networks.items()})

    def in_full_precision(self) -> "PeerOutputs":
        """Return the same in float32, where it is in half precision."""
        return self.with_logits(_up)


AnyOutputs: TypeAlias = Outputs | EnsembleOutputs | TopK | PeerOutputs
"""What a teacher gives: the outputs of a network, or of several, or its best classes alone."""


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors of several calls as one, along the samples.

    Raises:
        ValueError: For shapes that differ in more.
    """
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(
            f'the calls of a step give outputs of shapes {shapes}, expected one shape to join them: take calls="first"'
        )
    return torch.cat(list(parts))


def _up(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _all_up(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _up(feature) for name, feature in features.items()}


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
    """Return the logits in a network's output: a tensor, or what :func:`usual_logits` finds.

    Raises:
        TypeError: For anything else.
    """
    logits = output if isinstance(output, Tensor) else usual_logits(output)
    if logits is None:
        raise TypeError(
            f"expected the network to return its logits as a tensor, or an object with .logits or .prediction, got "
            f"{describe(output)}: wrap the network in a module whose forward returns the logits"
        )
    return logits


def usual_logits(output: Any) -> Tensor | None:
    """Return what an object or a mapping calls ``logits`` or ``prediction``; None where it has neither.

    Of transformers' question answering, ``start_logits`` and ``end_logits`` (B, S), these are both: (B, 2, S). A
    ``prediction`` may also be the class that is predicted: it is left where it is no floating-point numbers.
    """

    def part(name: str) -> Any:
        return select(output, name, "logits") if has_part(output, name) else None

    logits, prediction = part("logits"), part("prediction")
    if isinstance(logits, Tensor):
        return logits
    if isinstance(prediction, Tensor) and prediction.is_floating_point() and prediction.ndim:
        return prediction
    ends = [part("start_logits"), part("end_logits")]
    return torch.stack(ends, 1) if all(isinstance(end, Tensor) for end in ends) else None


def check_name(argument: str, name: object) -> None:
    """Raise TypeError for what is no name of a network in a module.

    Args:
        argument: That it was passed as.
        name: As it was passed.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"expected {argument}= to be the name of a network in the module, got a {type(name).__name__}: pass "
            f'{argument}="net" for self.net'
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
    found: dict[str, Tensor] = {}

    def take(name: str, output: Tensor) -> None:
        if name in found:
            raise ran_several_times(name)
        found[name] = output

    with tap(network, layers, take):
        yield found


@contextmanager
def tap(network: nn.Module, layers: Iterable[str], take: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Hand on each output of the named layers while the context lives; the hooks go with it.

    The second forward pass of gradient checkpointing, which belongs to the backward pass, is none.

    Args:
        network: Has the layers.
        layers: Their names.
        take: Gets a layer's name and output at each run; False for one that is not wanted.

    Raises:
        ValueError: For an unknown layer.
        RuntimeError: When a layer never gave a wanted output, or a later layer overwrote one in place.
        TypeError: When a layer returns something else than a tensor.
    """
    let_compiled_networks_see_hooks()
    taken: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in layers}

    def note(name: str, output: Any) -> None:
        if in_backward():
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {name!r} returns {type(output).__name__}, expected a tensor: name a layer inside it that does"
            )
        if take(name, output) is not False:
            taken[name].append((output, output._version))

    with ExitStack() as hooks:
        for name in taken:
            layer = find_layer(network, name)
            # The hook stays out of compiled graphs: a graph would go on writing to the first call's dictionary.
            hook: Callable[..., None] = torch.compiler.disable(  # type: ignore[no-untyped-call]
                lambda _module, _input, output, name=name: note(name, output)
            )
            hooks.enter_context(layer.register_forward_hook(hook))
        yield

    for name, outputs in taken.items():
        if not outputs:
            compiled = any(module._compiled_call_impl is not None for module in network.modules())
            stale = ", or, as the network is compiled, call torch.compiler.reset() after earlier calls of it"
            raise RuntimeError(
                f"layer {name!r} did not run in the forward pass: name a layer that the output needs"
                f"{stale if compiled else ''}"
            )
        if any(output._version != version for output, version in outputs):
            raise RuntimeError(
                f"the output of layer {name!r} was overwritten in place by a later layer (an in-place ReLU?): "
                "tap that later layer, or set its inplace=False"
            )


def ran_several_times(layer: str) -> RuntimeError:
    """Return the error for a layer that ran more than once in one forward pass."""
    return RuntimeError(
        f"layer {layer!r} ran several times in one forward pass, expected once: a module that is shared between places "
        "cannot be tapped; name a layer that runs once"
    )


def in_backward() -> bool:
    """Tell whether a backward pass is running, as in the second forward pass of gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def let_compiled_networks_see_hooks() -> None:
    """Have networks compiled from now on call hooks that are added later, where anything is compiled."""
    # By default a network that was compiled without hooks never calls those that are added later, as torch.compile's
    # manual says under "Hooks on nn.Module": a tap after an untapped call would stay empty.
    dynamo = sys.modules.get("torch._dynamo")  # not there where nothing is compiled; importing it takes a second
    if dynamo is not None and dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
