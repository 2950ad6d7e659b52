"""Parts of a configuration that know where they stand in it, so that what goes wrong names the path."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Signature, signature
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from kd_lightning.configuration.arguments import ConfigurationError, check_arguments, explained, in_a_line

_HYDRAS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


class Part:
    """A mapping with ``_target_``, or a container of such mappings.

    Args:
        node: Plain containers, interpolations resolved.
        path: Where it stands, such as ``teacher.optimizer``.
        places: Where single arguments stand, if elsewhere.

    Raises:
        ConfigurationError: For a target that is not there, and for arguments that it does not take.
    """

    def __init__(self, node: Any, path: str, places: Mapping[str, str] | None = None) -> None:
        self.node, self.path, self.places = node, path, dict(places or {})
        _check(node, path, self.places)

    def make(self, **arguments: Any) -> Any:
        """Make the object, or the container of objects.

        Raises:
            ConfigurationError: With the path of what cannot be made.
        """
        try:
            return instantiate(self.node, _convert_="all", **arguments)
        except InstantiationException as error:
            raise self._explained(error) from error

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Let whatever goes wrong name the path of this part, and the argument where that stands out."""
        try:
            yield
        except Exception as error:
            raise explained(error, self.node, self.path, self.places) from error

    def bound(self) -> "Bound":
        """Return what makes the object when it is called with what is not configured."""
        if not isinstance(self.node, Mapping) or "_target_" not in self.node:
            raise ConfigurationError(f"{self.path}: expected a mapping with _target_, got {self.node}")
        return Bound(self)

    def _explained(self, error: InstantiationException) -> ConfigurationError:
        keys = [line.removeprefix("full_key: ") for line in str(error).splitlines() if line.startswith("full_key: ")]
        node, path = self.node, self.path
        for key in keys[0].split(".") if keys else ():
            inside = node.get(key) if isinstance(node, Mapping) else node[int(key)] if isinstance(node, list) else None
            if inside is None:
                break
            node, path = inside, f"{path}.{key}"
        return explained(error.__cause__ or error, node, path, self.places if node is self.node else None)


class Bound:
    """Makes a part anew whenever it is called, with further arguments; has the signature of what is left to give."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._partial = Part({**part.node, "_partial_": True}, part.path, part.places)

    @property
    def __signature__(self) -> Signature:
        return signature(self._partial.make())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        make = self._partial.make()
        with self.part.errors():
            return make(*args, **kwargs)


def by_name(node: Mapping[str, Any], path: str) -> Part:
    """Return a part that consists of others by name, such as losses.

    Raises:
        ConfigurationError: Like :class:`Part`, and for one that is none.
    """
    for name, inner in node.items():
        if not isinstance(inner, Mapping) or "_target_" not in inner:
            raise ConfigurationError(f"{path}.{name}={inner}: expected a mapping with _target_, got {inner!r}")
    return Part(node, path)


def target_of(node: Any, path: str) -> Any:
    """Return the class or function that ``_target_`` names.

    Raises:
        ConfigurationError: When it is not there, or cannot be imported.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise ConfigurationError(f"{path}: expected a mapping with _target_, the dotted name of a class, got {node}")
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        return get_object(target)
    except Exception as error:  # whatever the import of a module raises
        raise ConfigurationError(f"{path}._target_={target}: {in_a_line(error.__cause__ or error)}") from error


def _check(node: Any, path: str, places: Mapping[str, str]) -> None:
    if isinstance(node, Mapping):
        if "_target_" in node:
            arguments = {name: value for name, value in node.items() if name not in _HYDRAS}
            check_arguments(target_of(node, path), arguments, path, places)
        for name, value in node.items():
            _check(value, f"{places.get(name, path)}.{name}", {})
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _check(value, f"{path}.{i}", {})
