"""Read a network's weights from checkpoints, without running anything that a file brings along."""

import re
import zipfile
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.quantization.state import float_weights, preparation_mismatch


def load_student(path: str | PathLike[str], name: str | None = None, quantizers: bool = False) -> dict[str, Tensor]:
    """Return the weights in a checkpoint of :class:`~kd_lightning.DistillationModule`: the bare student's state dict.

    Reads plain state dicts too, and checkpoints of other modules, whose hyperparameters may be objects of any class. Of
    a quantisation-aware training it gives the weights in float, as they are before they are rounded.

    Args:
        path: Of the file.
        name: Of a network that was trained along with the student; see :class:`~kd_lightning.teachers.Peers`.
        quantizers: Leave the quantisers' ranges among the weights, for a network that is prepared likewise.

    Raises:
        ValueError: For a file that is no checkpoint, is damaged, or whose weights are no tensors; for a name that it
            has not.

    Example::

        network.load_state_dict(load_student("last.ckpt"))
    """
    content = load_checkpoint(path)
    state = _state_of(content, path) if name is None else _peer_of(content, path, name)
    return state if quantizers else float_weights(state)


class Unread:
    """What stands in a checkpoint's content for an object that is more than tensors and plain values.

    Its class is a subclass that has the other class's name, for errors.
    """

    def __new__(cls, *args: object, **kwargs: object) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_checkpoint(path: str | PathLike[str]) -> Any:
    """Read what ``torch.save`` has written, on the CPU; its checksums are compared first, which PyTorch does not do.

    Tensors and plain values are read. In the place of any other object, such as hyperparameters that a project of
    others saves, stands one of :class:`Unread`: its class is not imported, and none of its code runs.

    Raises:
        ValueError: For a file that is no checkpoint, is damaged, or names what PyTorch blocks or cannot pass over.
    """
    foreign: list[str] = []
    with open(path, "rb"):  # what is missing or may not be read is no damage
        pass
    try:
        if zipfile.is_zipfile(path):  # but for what PyTorch wrote before 1.6
            with zipfile.ZipFile(path) as parts:
                damaged = parts.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged!r} in it has other bytes than were written, by its checksum")
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(type(name, (Unread,), {}), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zipfile and the unpickler raise nearly anything, OSError as well
        raise ValueError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Say it without PyTorch's advice to read the file with ``weights_only=False``, which runs what is in it."""
    text = str(error) or type(error).__name__
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found is not None:
        return (
            f"it holds {found[1]}, and reading that could run any code: expected tensors and plain values alone; let "
            "whoever wrote it save the weights, torch.save(network.state_dict(), path)"
        )
    first = (
        "its pickle is not one of tensors and plain values" if "weights_only" in text else re.split(r"\.\s|\n", text)[0]
    )
    return f"expected a whole file with tensors and plain values, got: {first}; is it damaged, or of another program?"


def _state_of(content: Any, path: str | PathLike[str]) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    parts = state.values() if isinstance(state, Mapping) else [content]
    foreign = next((type(part).__name__ for part in parts if isinstance(part, Unread)), None)
    if foreign is not None:
        raise ValueError(
            f"{path} holds {foreign} in the place of weights, and reading that could run any code: expected tensors; "
            "let whoever wrote it save the weights, torch.save(network.state_dict(), path)"
        )
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or 'state_dict' with them")
    return dict(state)


def _peer_of(content: Any, path: str | PathLike[str], name: str) -> dict[str, Tensor]:
    """Return the weights of a network that was trained along with the student: the losses hold it."""
    parts = content if isinstance(content, Mapping) else {}
    callbacks = parts.get("callbacks")  # where they are Distillation's
    owners = [parts, *(callbacks.values() if isinstance(callbacks, Mapping) else ())]
    losses = [owner.get("losses") for owner in owners if isinstance(owner, Mapping)]
    peers = {key: x for of in losses if isinstance(of, Mapping) for key, x in of.items() if key.startswith("peers.")}
    own = f"peers.{name}."
    found = {key.removeprefix(own): value for key, value in peers.items() if key.startswith(own)}
    if not found:
        names = list(dict.fromkeys(key.split(".")[1] for key in peers))
        raise ValueError(f"{path} holds no peer {name!r}, expected one of {names}")
    return found


def load_weights(network: nn.Module, path: str | PathLike[str]) -> None:
    """Load a checkpoint into a network, strictly; a common prefix of the checkpoint's names is taken off.

    Raises:
        ValueError: When names or shapes do not fit; nothing has been loaded then.
    """
    state, expected = _state_of(load_checkpoint(path), path), network.state_dict()
    found = {}
    for prefix in _prefixes(state, expected):
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if inner.keys() == expected.keys():
            found[prefix] = inner
    state = next(iter(found.values()), state)
    problem = mismatch(network, state)
    if problem:
        raise ValueError(f"{path} does not fit {type(network).__name__}: {problem}")
    network.load_state_dict(state)


def mismatch(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Say how a state dict differs from what the network expects; an empty string where it fits."""
    expected = network.state_dict()
    if problem := preparation_mismatch(expected, state):
        return problem
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(value.shape)} in the network"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if not (missing or unexpected or shapes):
        return ""
    return (
        f"{_few('missing', missing)}{_few('unexpected', unexpected)}{_few('of another shape', shapes)}"
        "expected a checkpoint of this very architecture: check its depth, width and number of classes"
    )


def _prefixes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    first = next(iter(expected), "")
    return [name.removesuffix(first) for name in state if name.endswith(first)]


def _few(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; "
