"""Copy a module without its weights: the copy has those of the module itself, until it writes to them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Copied = TypeVar("Copied", bound=nn.Module)


class BorrowedWeights:
    """Parameters that a copy of a module has in common with it.

    What the copy writes to one, within :meth:`kept_apart`, it gets as its own, and the module has the bits back that
    were there. Buffers, which are small and often written to, are copied, and so are parameters that are no plain
    tensors.
    """

    def __init__(self) -> None:
        self._borrowers: dict[int, list[nn.Parameter]] = {}

    def copy(self, module: Copied, shared: Mapping[int, Any]) -> Copied:
        """Return a deep copy of a module, but for its parameters.

        Args:
            module: Stays as it is.
            shared: By ``id``, what else is not copied.
        """
        memo: dict[int, Any] = dict(shared)
        for parameter in module.parameters():
            if _is_plain(parameter):
                memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
                self._note(memo[id(parameter)])
        return copy.deepcopy(module, memo)

    def renew(self, borrower: nn.Module, module: nn.Module) -> None:
        """Borrow from a module that may have moved since it was copied, by the parameters' names."""
        parameters = dict(module.named_parameters())
        self._borrowers.clear()
        for name, own in borrower.named_parameters():
            parameter = parameters.get(name)
            if parameter is not None and parameter.shape == own.shape and _is_plain(parameter) and _is_plain(own):
                own.data = parameter.data
                self._note(own)

    @contextmanager
    def kept_apart(self) -> Iterator[None]:
        """Let the copy's code run: what it writes is the copy's alone when the context ends, however it ends."""
        saving = _SaveBeforeWrites(set(self._borrowers))
        try:
            with saving:
                yield
        finally:
            for key, (storage, before) in saving.saved.items():
                for parameter in self._borrowers.pop(key):
                    if _key(parameter) == key:
                        parameter.data = parameter.data.clone()
                storage.copy_(before)

    def _note(self, parameter: nn.Parameter) -> None:
        self._borrowers.setdefault(_key(parameter), []).append(parameter)


class _SaveBeforeWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keep what storages hold before an operator writes to them, through whatever view, ``.data`` included."""

    supports_higher_order_operators = True

    def __init__(self, keys: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys = keys
        self.saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # a higher-order operator's parts come along by themselves
        for index, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in written if isinstance(written, list | tuple) else [written]:
                self._save(tensor)
        return func(*args, **kwargs)

    def _save(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return
        key = _key(tensor)
        if key in self.keys and key not in self.saved:
            storage = tensor.untyped_storage()
            self.saved[key] = storage, storage.clone()  # type: ignore[no-untyped-call]


def _is_plain(parameter: nn.Parameter) -> bool:
    return (
        type(parameter) is nn.Parameter
        and type(parameter.data) is Tensor
        and parameter.layout is torch.strided
        and not parameter.is_meta
    )


def _key(tensor: Tensor) -> int:
    """Return what views of the same memory have in common."""
    key: int = tensor.untyped_storage()._cdata
    return key
