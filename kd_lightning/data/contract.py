"""What a pipeline asks of a data module: what has to be there, and what else it uses where it is there."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from numbers import Real
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from kd_lightning.data.rewrapped import check_can_be_rewrapped, rewrapped

Wrap = Callable[[Any], Any]
"""Makes a data set of a data set, such as :class:`~kd_lightning.data.WithIds`."""

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


class Data:
    """A data module as a pipeline sees it. Nothing else looks for what a module may or may not have.

    A ``LightningDataModule`` with ``train_dataloader``, ``val_dataloader`` and ``test_dataloader`` is enough, the last
    two with one loader each. What else is used where it is there:

    - the arguments ``role`` (``teacher``, ``student``, ``control`` or ``distilled``: whose training samples) and
      ``seed`` (of their order). Without them all roles train on the same samples, in the module's own order.
    - ``training_set()``: the map-style data set that its training loader goes through, beneath the wrappers; and
      ``wrappers``: a list of functions, each of which its ``train_dataloader`` puts around that set. Without them the
      loader's data set is wrapped, and its sampler replaced where need be (:func:`~kd_lightning.data.rewrapped`).
      Where the set says ``deterministic = True``, a teacher's outputs for it are stored once for all seeds.
    - ``fingerprint()``: a string that changes with what this role sees of training, validation and test, and
      ``batch_size``: a stage is used again where both are the same; else where its configuration and code are.
    - ``digests()``: hash and number of the samples by what they are for (``training``, ``validation``, ``test``), which
      MLflow shows as datasets; without it the hashes are of the fingerprint, or of the configuration.
    - ``sources()``: the files and folders that it reads; with it, and where all else is as it was, the same command is
      answered at once. None where that is not known.
    - ``class_names``: in errors, in the verdict and in exported files; ``mean`` and ``std`` of the inputs: in these.
    - ``counts``: how many samples there are by name, which is logged; ``counts["unlabelled"]``: how many the distilled
      student has beyond those of the student alone. ``described``: further names and numbers that are logged.
    - what the report shows test units by: ``tokenizer`` with ``decode``, of tokens; ``feature_names`` of rows;
      ``target_mean`` and ``target_std`` of values that were standardised; ``words_of(inputs)``: one unit's inputs as
      words; ``test_groups``: names of parts of the test units, such as the documents that they are of, and an array
      that says for each unit which part it is in.

    Args:
        module: The data module.
        seed: Of the order in which samples are shuffled that are asked for as views.
    """

    def __init__(self, module: LightningDataModule, seed: int = 0) -> None:
        self.module: Any = module
        self._seed = seed
        self._wrappers: list[Wrap] = []
        self._plain_loader: Callable[[], Any] = getattr(module, "train_dataloader", _none)

    def check(self) -> None:
        """Look at what is there, before anything is loaded.

        Raises:
            TypeError: For something else than a data module.
            ValueError: For a loader that is missing, and for what is there and is something else than expected.
        """
        module = self.module
        if not isinstance(module, LightningDataModule):
            raise TypeError(f"expected a LightningDataModule, got {type(module).__name__}")
        missing = [name for name in _LOADERS if not is_overridden(name, module, LightningDataModule)]
        if missing:
            raise ValueError(
                f"{type(module).__name__} has no {' and no '.join(missing)}, expected {', '.join(_LOADERS)}: models "
                "are trained on the first, chosen on the second and compared on the third"
            )
        for name, fits, expected in (
            ("training_set", callable, "a method that returns the training set"),
            ("fingerprint", callable, "a method that returns a string"),
            ("sources", callable, "a method that returns paths"),
            ("digests", callable, "a method that returns (hash, number) by split"),
            ("wrappers", _is_list, "a list of functions, empty at first"),
            ("batch_size", _is_count, "a whole number of 1 or more"),
            ("class_names", _are_names, "names, one for each class"),
            ("mean", _are_numbers, "a number for each channel, or one for all"),
            ("std", _are_numbers, "a number for each channel, or one for all"),
        ):
            value = self._found(name)
            if value is not None and not fits(value):
                raise ValueError(f"{type(module).__name__}.{name} is {value!r}, expected {expected}, or leave it out")

    @property
    def class_names(self) -> Sequence[str] | None:
        return class_names_of(self.module)

    @property
    def mean(self) -> Sequence[float]:
        return _numbers(self._found("mean", ()))

    @property
    def std(self) -> Sequence[float]:
        return _numbers(self._found("std", ()))

    @property
    def unlabelled(self) -> int:
        """How many samples the distilled student has beyond those of the student alone."""
        counts = self._found("counts")
        return int(counts.get("unlabelled", 0)) if isinstance(counts, Mapping) else 0

    @property
    def described(self) -> dict[str, str | int]:
        """What MLflow shows of the data: samples by name, and what the module says besides."""
        counts = self._found("counts")
        samples = (
            {f"samples/{name}": int(count) for name, count in counts.items()} if isinstance(counts, Mapping) else {}
        )
        return {**samples, **self._found("described", {})}

    @property
    def test_groups(self) -> tuple[Sequence[str], Sequence[int]] | None:
        """Parts of the test units, by name, and for each unit which it is in; None where the module names none."""
        found: tuple[Sequence[str], Sequence[int]] | None = self._found("test_groups")
        return found

    @property
    def batch_size(self) -> int | None:
        """Of the training; None where nothing says."""
        own = self._found("batch_size")
        return own if own is not None else getattr(self.train_dataloader(), "batch_size", None)

    def fingerprint(self) -> list[Any] | None:
        """Return what a stage is used again by; None where the module does not say."""
        own = self._found("fingerprint")
        return None if own is None else [own(), self._found("batch_size")]

    def sources(self) -> Sequence[Path] | None:
        """Return the files and folders that it reads; None where the module does not say."""
        own = self._found("sources")
        return None if own is None else own()

    def digests(self) -> dict[str, tuple[str, int]] | None:
        """Return hash and number of the samples of each split; None where the module does not say."""
        own = self._found("digests")
        return None if own is None else own()

    def training_set(self) -> Any:
        """Return the data set that the training goes through, beneath all that was put around it.

        Raises:
            ValueError: Where the training loader has none of which samples could be asked.
        """
        own = self._found("training_set")
        if own is not None:
            return own()
        loader = self._plain_loader()
        check_can_be_rewrapped(loader)
        return loader.dataset

    @property
    def augmented(self) -> bool:
        """Whether the training set's samples may be others with another seed; so they are unless it says so."""
        return not getattr(self.training_set(), "deterministic", False)

    def collate_fn(self) -> Callable[[Any], Any] | None:
        """Return how the training loader makes a batch of samples; None where it does not say."""
        return getattr(self._plain_loader(), "collate_fn", None)

    def train_dataloader(self) -> Any:
        return self.module.train_dataloader()

    def val_dataloader(self) -> Any:
        return _one_loader(self.module.val_dataloader(), "val_dataloader")

    def test_dataloader(self) -> Any:
        return _one_loader(self.module.test_dataloader(), "test_dataloader")

    def setup(self, stage: str) -> None:
        """Download what is missing, and make the data sets of ``fit``, ``validate`` or ``test``."""
        self.module.prepare_data()
        self.module.setup(stage)

    def wrap(self, wrap: Wrap, innermost: bool = False) -> None:
        """Put something around the training set: around all that is there already, or beneath it."""
        given = self._found("wrappers")
        before = self._wrappers if given is None else list(given)
        wrappers = [wrap, *before] if innermost else [*before, wrap]
        if given is not None:
            self.module.wrappers = wrappers
            return
        self._wrappers = wrappers
        made = partial(_rewrapped_loader, self._plain_loader, wrappers, self._seed)
        self.module.train_dataloader = made

    def check_can_be_wrapped(self) -> None:
        """Raise ValueError where nothing can be put around the training set; nothing stays around it."""
        if self._found("wrappers") is None:
            check_can_be_rewrapped(self._plain_loader())
            return
        before, seen = self.module.wrappers, list[Any]()

        def see(dataset: Any) -> Any:
            seen.append(dataset)
            return dataset

        self.module.wrappers = [*before, see]
        try:
            self.train_dataloader()
        finally:
            self.module.wrappers = before
        if not seen:
            raise ValueError(
                f"{type(self.module).__name__} has wrappers, which its train_dataloader does not call, expected it to "
                "put each around the training set, in their order: do that, or leave wrappers out"
            )

    def _found(self, name: str, default: Any = None) -> Any:
        value = getattr(self.module, name, None)
        return default if value is None else value


def class_names_of(module: Any) -> Sequence[str] | None:
    """Return the names that a data module has for the classes; None where it names none, or is None."""
    names: Sequence[str] | None = getattr(module, "class_names", None)
    return names


def make_data(make: Callable[..., LightningDataModule], role: str, seed: int) -> Data:
    """Make a data module for a role and a seed, each of which it is told only where it takes it."""
    parameters = signature(make).parameters
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {"role": role, "seed": seed}
    return Data(make(**{name: value for name, value in given.items() if takes_any or name in parameters}), seed)


def _rewrapped_loader(make: Callable[[], Any], wrappers: Sequence[Wrap], seed: int) -> DataLoader[Any]:
    return rewrapped(make(), wrappers, seed)


def _one_loader(loader: Any, name: str) -> Any:
    if isinstance(loader, Mapping | list | tuple):
        raise ValueError(
            f"{name} returns a {type(loader).__name__}, expected one loader: a model is judged on one set of samples; "
            "join them, torch.utils.data.ConcatDataset"
        )
    return loader


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_names(value: Any) -> bool:
    return _is_list(value) and all(isinstance(item, str) for item in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Real) or (_is_list(value) and all(isinstance(item, Real) for item in value))


def _numbers(value: Any) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, Real) else tuple(value)


def _none() -> None:
    """Stand in for the training loader of something that is no data module, until that is said."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
