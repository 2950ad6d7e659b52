"""What all data modules of this package have in common: roles, subsets and loaders."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from kd_lightning.data.loaders import in_order, shuffled

ROLES = ("teacher", "student", "control", "distilled")


class Subset(Protocol):
    """A data set with what a fingerprint depends on."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any) -> Any: ...
    def content(self) -> bytes: ...


class RoleData(LightningDataModule):
    """Subsets by name, loaded once; a subclass says how, and which one its role trains on.

    Attributes:
        wrappers: What is put around the training set, in this order: :class:`~kd_lightning.data.WithIds`, where a loss
            remembers samples; ``StoredOutputs``, where the teacher's outputs were stored. A pipeline sets it.
    """

    def __init__(self, batch_size: int, eval_batch_size: int, num_workers: int, role: str, seed: int) -> None:
        super().__init__()
        if role not in ROLES:
            raise ValueError(f"expected role to be one of {', '.join(ROLES)}, got {role!r}")
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"expected {name} of 1 or more, got {value}")
        if num_workers < 0:
            raise ValueError(f"expected num_workers of 0 or more, got {num_workers}")
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.role, self.seed = role, seed
        self.wrappers: Sequence[Callable[[Any], Any]] = ()
        self._subsets: Mapping[str, Any] = {}

    def load_subsets(self) -> Mapping[str, Subset]:
        """Return all subsets by name, ``validation`` and ``test`` among them."""
        raise NotImplementedError

    def training_set(self) -> Subset:
        """Return what the role trains on."""
        training: Subset = self.subset("train")
        return training

    def subset(self, name: str) -> Any:
        """Return a subset of those that :attr:`counts` names."""
        self.setup()
        return self._subsets[name]

    @property
    def counts(self) -> dict[str, int]:
        """Samples in each subset."""
        self.setup()
        return {name: len(subset) for name, subset in self._subsets.items()}

    def setup(self, stage: str = "fit") -> None:
        self._subsets = self._subsets or self.load_subsets()

    def train_dataloader(self) -> DataLoader[Any]:
        training: Any = self.training_set()
        if not len(training):
            raise ValueError(f"expected samples for the role {self.role}, got none of {self.counts}: ask for some")
        for wrap in self.wrappers:
            training = wrap(training)
        return shuffled(training, self.batch_size, self.seed, self.trainer, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return in_order(self.subset("validation"), self.eval_batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        return in_order(self.subset("test"), self.eval_batch_size, self.num_workers)

    def sources(self) -> Sequence[Path] | None:
        """Return the files and folders that it reads, beyond those of this package; None where it does not say."""
        own = type(self).__module__.partition(".")[0] == __package__.partition(".")[0]
        return self.files_read() if own else None  # a subclass may read others

    def files_read(self) -> Sequence[Path] | None:
        """Return those of a module of this package; None where its parts do not say."""
        return ()

    def digests(self) -> dict[str, tuple[str, int]]:
        """Return hash and number of the samples of each split that this role sees, as MLflow shows them."""
        return {
            name: (hashlib.sha256(subset.content()).hexdigest(), len(subset)) for name, subset in self.parts().items()
        }

    def parts(self) -> dict[str, Subset]:
        """Return what this role sees: ``training``, ``validation`` and ``test``."""
        return {"training": self.training_set(), "validation": self.subset("validation"), "test": self.subset("test")}

    def fingerprint(self) -> str:
        """Hash the inputs, targets and kind of augmentation that this role's training, the validation and the test see.

        Two modules with the same one give the same result under the same seed and batch size, whatever options they
        were made with: the teacher's does not change with the student's number of labels.
        """
        digest = hashlib.sha256()
        for subset in (self.training_set(), self.subset("validation"), self.subset("test")):
            digest.update(f"{len(subset)} ".encode())
            digest.update(subset.content())
        return digest.hexdigest()
