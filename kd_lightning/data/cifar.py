"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), https://www.cs.toronto.edu/~kriz/cifar.html."""

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.download import cache_folder, check, download
from kd_lightning.data.image_data import ImageData, draw
from kd_lightning.data.in_memory import CropAndFlip, InMemory

_PIXELS = 3 * 32 * 32


class CIFAR(ImageData):
    """32×32 colour images; teacher and student see all training images, cropped at random and mirrored.

    Read from the publisher's *binary version*, which holds no Python pickle: a file from a stranger could run code.

    Args:
        folder: Where the publisher's archive is, or is downloaded to; otherwise the cache.
        download: Fetch the archive (160 MB) where it is missing.
        augment: Whether training images are cropped out of the image padded by 4, and every other one mirrored.
        validation: How many of the 50,000 training images are kept for validation; as all evaluation, not augmented.
        batch_size: Of the training.
        eval_batch_size: Of validation and test.
        num_workers: Processes that load.
        split_seed: Of the draw of the validation images; the same for all seeds of the training.
        role: Of the pipeline; each sees the same images.
        seed: Of the order of the training images and of their augmentation, together with the epoch.

    Raises:
        ValueError: For a missing, torn or foreign archive, or more validation images than there are.
        OSError: When the download fails.
    """

    input_shape = (3, 32, 32)
    publisher: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/"
    archive: ClassVar[str]
    md5: ClassVar[str]
    prefix: ClassVar[str]
    train_members: ClassVar[Sequence[str]]
    test_members: ClassVar[Sequence[str]]
    names_member: ClassVar[str]
    label_bytes: ClassVar[int]  # before each image; the last one is the class

    def __init__(
        self,
        folder: str | Path | None = None,
        download: bool = False,
        augment: bool = True,
        validation: int = 5000,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        split_seed: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        self.file = (Path(folder) if folder is not None else cache_folder("cifar")) / self.archive
        self.download, self.augment = download, augment
        self.validation, self.split_seed = validation, split_seed

    def files_read(self) -> Sequence[Path]:
        return [self.file]

    def prepare_data(self) -> None:
        if self.file.is_file():
            check(self.file, self.md5, "md5")
        elif self.download:
            download(self.publisher + self.archive, self.file, self.md5, "md5", f"put it into {self.file.parent}")
        else:
            raise ValueError(f"{self.file} is missing: pass download=True, or the folder it is in")

    def load_subsets(self) -> dict[str, InMemory]:
        self.prepare_data()
        images, labels, test_images, test_labels = self._read_archive()
        held_out, training = draw(
            np.arange(len(labels)),
            [self.validation, max(len(labels) - self.validation, 0)],
            self.split_seed,
            "keep fewer for validation",
        )
        augment = CropAndFlip(len(training), self.seed) if self.augment else None
        return {
            "train": InMemory(images[training], labels[training], self.mean, self.std, augment),
            "validation": InMemory(images[held_out], labels[held_out], self.mean, self.std),
            "test": InMemory(test_images, test_labels, self.mean, self.std),
        }

    def _read_archive(self) -> tuple[NDArray[np.uint8], ...]:
        members = (*self.train_members, *self.test_members)
        parts = {}
        try:
            with tarfile.open(self.file, "r:gz") as archive:
                for member in archive:  # in its order: going back means to decompress anew
                    name = member.name.removeprefix("./").removeprefix(f"{self.prefix}/")
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None and name in (*members, self.names_member):
                        parts[name] = content.read()
            records = {
                name: np.frombuffer(parts[name], np.uint8).reshape(-1, self.label_bytes + _PIXELS) for name in members
            }
            self.class_names = tuple(parts[self.names_member].decode().split())
        except (OSError, tarfile.TarError, EOFError, zlib.error, KeyError, ValueError) as error:
            raise ValueError(f"{self.file} is torn or another file ({error}): expected {', '.join(members)}") from error
        train, test = (
            np.concatenate([records[name] for name in names]) for names in (self.train_members, self.test_members)
        )
        for part in (train, test):
            wrong = part[:, self.label_bytes - 1].max(initial=0)
            if wrong >= self.num_classes:
                raise ValueError(f"{self.file} has a class {wrong}, expected 0 to {self.num_classes - 1}")
        images, labels, test_images, test_labels = (
            array
            for part in (train, test)
            for array in (part[:, self.label_bytes :].reshape(-1, 3, 32, 32), part[:, self.label_bytes - 1])
        )
        return images, labels, test_images, test_labels


class CIFAR10(CIFAR):
    """Ten classes of 6,000 images each; options as in :class:`CIFAR`."""

    num_classes = 10
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    archive, md5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
    prefix, names_member = "cifar-10-batches-bin", "batches.meta.txt"
    train_members, test_members = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
    label_bytes = 1


class CIFAR100(CIFAR):
    """A hundred classes of 600 images each; options as in :class:`CIFAR`."""

    num_classes = 100
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    archive, md5 = "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"
    prefix, names_member = "cifar-100-binary", "fine_label_names.txt"
    train_members, test_members = ("train.bin",), ("test.bin",)
    label_bytes = 2  # one of 20 groups, then the class
