"""Whether arguments from a configuration are what a function or a class takes, before it is called."""

import builtins
import collections.abc
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from torch import nn

_NUMBERS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a finite number"}
_STRINGS: dict[Any, str] = {str: "a string", Path: "a path"}
_LONGEST = 600


class ConfigurationError(ValueError):
    """A mistake in the configuration; the message begins with the path of what is wrong."""


@contextmanager
def errors_at(*paths: str, arguments: Any = None) -> Iterator[None]:
    """Let whatever goes wrong name the parts of the configuration that it comes from; without any, it stays as it is.

    Args:
        paths: Of these parts.
        arguments: Of the part, where it is one.

    Raises:
        ConfigurationError: In place of any other exception.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        if not paths:
            raise
        raise explained(error, arguments, ", ".join(dict.fromkeys(paths))) from error


def in_a_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, with its type where the message alone says little."""
    message = " ".join(str(error.args[1] if isinstance(error, OSError) and len(error.args) > 1 else error).split())
    if isinstance(error, OSError) and error.filename is not None:
        message += f": {error.filename}"
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} ..."
    expected = isinstance(
        error, ValueError | TypeError | OSError | ImportError | NotImplementedError | FloatingPointError
    )
    if expected or type(error).__name__ == "MisconfigurationException":
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (HYDRA_FULL_ERROR=1 shows where)"


def explained(
    error: BaseException, arguments: Any, path: str, places: Mapping[str, str] | None = None
) -> ConfigurationError:
    """Say which part of the configuration an error is about, and which argument where that stands out.

    Args:
        error: What went wrong.
        arguments: The part's, by name.
        path: Where the part stands in the configuration.
        places: Paths of arguments that stand elsewhere, by name.
    """
    if isinstance(error, ConfigurationError):
        return error
    message = in_a_line(error)
    given = dict(arguments) if isinstance(arguments, Mapping) else {}
    given.pop("_target_", None)
    name = blamed(message, given)
    if name is None:
        return ConfigurationError(f"{path}: {message}")
    where = (places or {}).get(name, path)
    return ConfigurationError(f"{where}.{name}={_short(given[name])}: {message}")


def check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], path: str, places: Mapping[str, str] | None = None
) -> None:
    """Compare names and types of arguments with a signature; a missing one is left to the call.

    A mapping with ``_target_`` stands for what is made of it, and fits everything. Classes that a string or a number
    cannot be told to be fit everything as well.

    Args:
        target: What will be called.
        arguments: As the configuration has them.
        path: Where they stand in it.
        places: Where single ones stand, if elsewhere.

    Raises:
        ConfigurationError: With the path of an argument, what was expected and what was got.

    Example:
        >>> def kd(temperature: float = 4.0): ...
        >>> check_arguments(kd, {"temperature": "T"}, "kd")
        Traceback (most recent call last):
        kd_lightning.configuration.arguments.ConfigurationError: kd.temperature=T: expected a finite number, got 'T'
    """
    try:
        parameters = signature(target).parameters
    except (TypeError, ValueError):  # some that are written in C have none
        return
    names = {n for n, p in parameters.items() if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    hints = _hints(target)
    for name, value in arguments.items():
        where = f"{(places or {}).get(name, path)}.{name}"
        if name not in names and not takes_any:
            raise ConfigurationError(
                f"{where}: {getattr(target, '__name__', target)} has no such argument, expected {_near(name, names)}"
            )
        if name in hints and not (value is None and name in names and parameters[name].default is None):
            check_value(value, hints[name], where)


def check_value(value: Any, kind: Any, path: str) -> None:
    """Raise ConfigurationError for a value that is not of a kind, a type as annotations have it.

    Of a TypedDict, which keys are there is compared as well.
    """
    if is_typeddict(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        for name in kind.__required_keys__ - value.keys():
            raise ConfigurationError(f"{_under(path, name)}: expected {_named(hints[name])}, got nothing")
        for name in value.keys() - hints.keys():
            raise ConfigurationError(f"{_under(path, name)}: nothing reads it, expected {_near(name, hints)}")
        for name, item in value.items():
            check_value(item, hints[name], _under(path, name))
        return
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, Mapping) and "_target_" not in value and _is(origin or kind, Mapping):
        for name, item in value.items():
            check_value(item, inner[1] if len(inner) == 2 else Any, _under(path, str(name)))
        return
    if fits(value, kind):
        return
    if isinstance(value, list | tuple) and _is_list(kind):
        for i, item in enumerate(value):
            of_item = inner[0] if inner and not (origin is tuple and len(inner) != len(value)) else Any
            if not fits(item, of_item):
                raise ConfigurationError(f"{path}={_short(value)}: expected {_named(of_item)} at {i}, got {item!r}")
    quote = f": quote it, {path}=\"'{value}'\"" if _named(kind) == "a string" and isinstance(value, int | float) else ""
    raise ConfigurationError(f"{path}={_short(value)}: expected {_named(kind)}, got {_short(value, repr)}{quote}")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value from a configuration can be passed for an annotation."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        plain = [part for part in inner if _is_plain(part)]
        known = [part for part in plain if part is not type(None)]
        # A number or a tensor, say: a string is neither.
        return any(fits(value, part) for part in (plain if known else inner))
    if kind is None or kind is type(None):
        return value is None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind in _STRINGS or (isinstance(kind, type) and kind.__name__ == "PathLike"):
        return isinstance(value, str)
    if _is_list(kind):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(item, inner[0]) for item in value)
    if _is(origin or kind, Mapping):
        return isinstance(value, Mapping) and (len(inner) != 2 or all(fits(item, inner[1]) for item in value.values()))
    if origin is Callable or kind is Callable:
        return not isinstance(value, str | int | float | list | None)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return not isinstance(value, Mapping)  # one without _target_ makes no network
    return True  # a class that only an object can be of, or a type variable


def blamed(message: str, arguments: Mapping[str, Any]) -> str | None:
    """Return the argument that an error speaks of, by its name and its value; None where none, or several, do.

    Example:
        >>> blamed("expected temperature > 0, got -1", {"temperature": -1, "weight": 0.9})
        'temperature'
        >>> blamed("Invalid learning rate: -1", {"lr": -1, "weight_decay": 0.0})
        'lr'
    """
    found: list[tuple[int, str]] = []
    for name, value in arguments.items():
        by_name = re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message)
        by_value = max((rank for text, rank in _texts(value).items() if _holds(message, text)), default=0)
        if by_name and not by_value and "_" not in name and f"expected {name}" not in message:
            by_name = None  # an ordinary word
        if by_name or by_value:
            found.append((3 * bool(by_name) + by_value, name))
    if not found:
        return None
    best = max(found)
    return best[1] if sum(rank == best[0] for rank, _ in found) == 1 else None


def _texts(value: Any) -> dict[str, int]:
    """Return how a message may write a value, and how much that says; a quoted string says more than a bare one."""
    if value is None or isinstance(value, bool | Mapping):
        return {}
    if isinstance(value, int):
        return {str(value): 1, str(float(value)): 1}
    if isinstance(value, list | tuple):
        return {str(value): 2, **{repr(item): 2 if isinstance(item, str) else 1 for item in value}}
    return {str(value): 1, repr(value): 2}


def _holds(message: str, text: str) -> bool:
    return bool(text) and re.search(rf"(?<![\w.-]){re.escape(text)}(?!\w)(?!\.\d)", message) is not None


class _Names(dict[str, Any]):
    """What an annotation may name; what is imported for type checkers alone stands for anything."""

    def __init__(self, of_module: Mapping[str, Any]) -> None:
        super().__init__()
        self._sources = (of_module, vars(builtins), vars(collections.abc), vars(typing))

    def __missing__(self, name: str) -> Any:
        return next((source[name] for source in self._sources if name in source), Any)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        return get_type_hints(function, localns=_Names(getattr(inspect.unwrap(function), "__globals__", {})))
    except Exception:  # an annotation may be anything
        return {}


def _is(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _is_list(kind: Any) -> bool:
    plain = get_origin(kind) or kind
    # Not whatever can be iterated, as a tensor can.
    abstract = getattr(plain, "__module__", None) == "collections.abc" and _is(plain, Iterable)
    return plain in (list, tuple, set, frozenset) or (abstract and not _is(plain, Mapping))


def _is_plain(kind: Any) -> bool:
    """Tell whether a yaml can hold a value of this kind."""
    plain = get_origin(kind) or kind
    return plain in (bool, int, float, *_STRINGS, Literal, type(None)) or _is_list(kind) or _is(plain, Mapping)


def _named(kind: Any) -> str:
    """Name a kind of values for a reader."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        choices = [choice for part in inner if get_origin(part) is Literal for choice in get_args(part)]
        parts = [f"one of {', '.join(dict.fromkeys(map(str, choices)))}"] if choices else []
        parts += [_named(part) for part in inner if _is_plain(part) and get_origin(part) is not Literal]
        return " or ".join(part for part in dict.fromkeys(parts) if float not in inner or part != _NUMBERS[int])
    if kind is type(None):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind in _NUMBERS or kind in _STRINGS:
        return _NUMBERS.get(kind) or _STRINGS[kind]
    if _is_list(kind):
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return f"a list of {len(inner)}"
        return f"a list, each {_named(inner[0])}" if inner and _is_plain(inner[0]) else "a list"
    if _is(origin or kind, Mapping) or is_typeddict(kind):
        return "a mapping"
    return "a mapping with _target_"


def _near(name: str, names: Collection[str]) -> str:
    """List names to choose from: the nearest, or all where they are few."""
    near = get_close_matches(name, names, n=3) or (sorted(names) if len(names) <= 12 else [])
    return f"one of {', '.join(near)}" if near else f"one of {len(names)} others"


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(value: Any, write: Callable[[Any], str] = str) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else write(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
