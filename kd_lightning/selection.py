"""Take a part out of what somebody else made: a network's output, or a batch."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

Selector: TypeAlias = str | int | Callable[[Any], Any]
"""A key or an attribute, an index, or a function of the whole. The first two can be pickled."""


def select(whole: Any, selector: Selector, argument: str) -> Any:
    """Return the part of ``whole`` that a selector names.

    Args:
        whole: A mapping, a (named) tuple, a dataclass or another object.
        selector: Names the part.
        argument: The argument that the selector was passed as, for errors.

    Raises:
        ValueError: When there is no such part, or the function fails; says which parts there are.
    """
    if not isinstance(selector, str | int):
        try:
            return selector(whole)
        except Exception as error:
            raise ValueError(
                f"{argument}= failed with {type(error).__name__}: {error}; what it was given is {describe(whole)}: "
                "return a part of that"
            ) from error
    if not has_part(whole, selector):
        raise ValueError(f"{argument}={selector!r} is no part of {describe(whole)}: {_remedy(whole, argument)}")
    if isinstance(whole, Mapping) and selector in whole:
        return whole[selector]
    if isinstance(selector, str):
        return getattr(whole, selector)
    return tuple(whole.values())[selector] if isinstance(whole, Mapping) else whole[selector]


def has_part(whole: Any, selector: str | int) -> bool:
    """Tell whether ``whole`` has that key, attribute or index; a tensor has none, its entries being samples."""
    if isinstance(whole, Tensor):
        return False
    if isinstance(whole, Mapping) and selector in whole:
        return True
    if isinstance(selector, str):
        if isinstance(whole, Mapping | tuple | list):
            return selector in getattr(whole, "_fields", ())
        return not callable(getattr(whole, selector, len))
    # Of mappings only those of transformers, which have an order that is documented.
    indexed = whole if isinstance(whole, tuple | list) or hasattr(whole, "to_tuple") else ()
    return -len(indexed) <= selector < len(indexed)


def describe(whole: Any) -> str:
    """Say what something holds: ``a dict with 'prediction' (2, 4), 'loss' ()``."""
    if isinstance(whole, Tensor):
        return f"a tensor {tuple(whole.shape)}"
    parts: list[tuple[Any, Any]]
    if isinstance(whole, Mapping):
        parts = list(whole.items())
    elif isinstance(whole, tuple | list) and not hasattr(whole, "_fields"):
        parts = list(enumerate(whole))
    else:
        names = getattr(whole, "_fields", None) or _attributes(whole)
        parts = [(name, getattr(whole, name)) for name in names]
    named = [f"{key!r} {_shape(value)}" for key, value in parts[:8]]
    article = "an" if type(whole).__name__[:1] in "AEIOaeio" else "a"
    holding = f" with {', '.join(named)}{', …' if len(parts) > 8 else ''}" if named else ""
    return f"{article} {type(whole).__name__}{holding}"


def check_selector(argument: str, selector: object) -> None:
    """Raise TypeError for what selects nothing.

    Args:
        argument: The argument that it was passed as.
        selector: None where it was left out.
    """
    if selector is None or (isinstance(selector, str | int) and not isinstance(selector, bool)) or callable(selector):
        return
    raise TypeError(
        f"expected {argument}= to be a key, an attribute's name, an index or a function, got a "
        f"{type(selector).__name__}"
    )


def _attributes(whole: Any) -> list[str]:
    if is_dataclass(whole):  # which may have slots, and no __dict__
        return [field.name for field in fields(whole)]
    return [name for name in getattr(whole, "__dict__", ()) if not name.startswith("_")]


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"


def _remedy(whole: Any, argument: str) -> str:
    if isinstance(whole, Tensor):
        return f"leave {argument}= out, or pass a function of it"
    return f"name one of these, or pass {argument}= a function of it"
