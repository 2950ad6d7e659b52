"""Fashion-MNIST (Xiao et al., 2017), https://arxiv.org/abs/1708.07747; the images are under the MIT licence."""

import gzip
import hashlib
import os
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.data.subsets import InMemory, check_role, draw, in_order, normalised, shuffled
from kd_lightning.tasks.classification import IGNORE_INDEX

PACKAGED = Path(__file__).parent / "fashion_mnist_15k.npz"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts the whole set
PUBLISHER = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_WHOLE_TRAIN = 59_000  # of the publisher's 60,000; the last 1,000 are for validation

Arrays = dict[str, NDArray[np.uint8]]


class FashionMNIST(LightningDataModule):
    """28×28 grey images of ten kinds of clothes, divided among teacher and student.

    The teacher's images are the first of the training images, the student's pool those after them; the labelled and
    the unlabelled ones are drawn from the pool at random. Validation and test images are nobody's to train on.

    Args:
        teacher_images: How many the teacher trains on.
        labelled: How many of the pool the student gets with their labels.
        unlabelled: How many further ones the control and the distilled student get without (target -100).
        exclude_classes: Classes of which the student gets no image; the teacher, validation and test keep them.
        share_images: Whether the pool is the teacher's own images.
        whole: Take the publisher's 60,000 + 10,000 images in place of the 12,000 + 1,000 + 2,500 that come with the
            package.
        folder: Where the publisher's four ``.gz`` files are; implies ``whole``. Otherwise they are looked for where
            Debian's package dataset-fashion-mnist puts them, in the cache, and downloaded.
        batch_size: Of the training.
        eval_batch_size: Of validation and test.
        split_seed: Of the draw; the same for all seeds of the training.
        role: Whose training images ``train_dataloader`` gives: ``teacher``, ``student`` (labelled only), ``control`` or
            ``distilled`` (labelled and unlabelled).
        seed: Of the order of the training images, together with the epoch.

    Attributes:
        counts: Images in each subset.

    Raises:
        ValueError: For more images than there are, a damaged or foreign file, an unknown role or class.
        OSError: When the whole set is neither on disk nor can be downloaded.
    """

    num_classes = 10
    class_names = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
    input_shape = (1, 28, 28)
    mean, std = (0.2860,), (0.3530,)  # of the 60,000 training images, with pixels in [0, 1]

    def __init__(
        self,
        teacher_images: int = 6000,
        labelled: int = 300,
        unlabelled: int = 0,
        exclude_classes: Sequence[int] = (),
        share_images: bool = False,
        whole: bool = False,
        folder: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        split_seed: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_role(role)
        wrong = [c for c in exclude_classes if c not in range(self.num_classes)]
        if wrong:
            raise ValueError(f"expected exclude_classes among 0 to {self.num_classes - 1}, got {wrong}")
        self.teacher_images, self.labelled, self.unlabelled = teacher_images, labelled, unlabelled
        self.exclude_classes, self.share_images = tuple(exclude_classes), share_images
        self.whole, self.folder = whole or folder is not None, folder
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.split_seed, self.role, self.seed = split_seed, role, seed
        self._sets: dict[str, InMemory] = {}

    @property
    def counts(self) -> dict[str, int]:
        self.setup()
        return {name: len(subset) for name, subset in self._sets.items()}

    def prepare_data(self) -> None:
        if self.whole:
            find_whole_set(self.folder)

    def setup(self, stage: str = "fit") -> None:
        if self._sets:
            return
        arrays = read_whole_set(find_whole_set(self.folder)) if self.whole else read_packaged()
        train_labels = arrays["train_labels"]
        if self.teacher_images > len(train_labels):
            raise ValueError(f"expected teacher_images up to {len(train_labels)}, got {self.teacher_images}")
        teacher = np.arange(self.teacher_images)
        pool = teacher if self.share_images else np.arange(self.teacher_images, len(train_labels))
        pool = pool[~np.isin(train_labels[pool], self.exclude_classes)]
        labelled, unlabelled = draw(pool, [self.labelled, self.unlabelled], self.split_seed, "labelled + unlabelled")
        self._sets = {
            "teacher": self._subset(arrays, "train", teacher),
            "labelled": self._subset(arrays, "train", labelled),
            "unlabelled": self._subset(arrays, "train", unlabelled, with_labels=False),
            "validation": self._subset(arrays, "val"),
            "test": self._subset(arrays, "test"),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        return shuffled(self._training_set(), self.batch_size, self.seed, self.trainer)

    def val_dataloader(self) -> DataLoader[Any]:
        return in_order(self._sets["validation"], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return in_order(self._sets["test"], self.eval_batch_size)

    def fingerprint(self) -> str:
        """Hash what this role's training, the validation and the test see, and in which order."""
        self.setup()
        digest = hashlib.sha256(f"{self.batch_size} {self.seed}".encode())
        for subset in (self._training_set(), self._sets["validation"], self._sets["test"]):
            digest.update(subset.images.numpy().tobytes())
            digest.update(subset.target.numpy().tobytes())
        return digest.hexdigest()

    def _training_set(self) -> InMemory:
        if self.role == "teacher":
            return self._sets["teacher"]
        labelled, unlabelled = self._sets["labelled"], self._sets["unlabelled"]
        if self.role == "student" or not len(unlabelled):
            return labelled
        images = torch.cat([labelled.images, unlabelled.images])
        return InMemory(images, torch.cat([labelled.target, unlabelled.target]))

    def _subset(
        self, arrays: Arrays, split: str, index: NDArray[np.int64] | None = None, with_labels: bool = True
    ) -> InMemory:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if index is not None:
            images, labels = images[index], labels[index]
        target = torch.from_numpy(labels).long() if with_labels else torch.full((len(labels),), IGNORE_INDEX)
        return InMemory(normalised(images[:, None], Tensor(self.mean), Tensor(self.std)), target)


def read_packaged(file: Path = PACKAGED) -> Arrays:
    """Read the images that come with the package.

    Raises:
        ValueError: When the file is damaged or another one.
    """
    names = [f"{split}_{what}" for split in ("train", "val", "test") for what in ("images", "labels")]
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name].copy() for name in names}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is damaged or another file ({error}), expected {', '.join(names)}: reinstall"
        ) from error


def find_whole_set(folder: str | None = None) -> Path:
    """Return the folder of the publisher's four files, downloading them where they are nowhere.

    Raises:
        ValueError: For a file with another checksum.
        OSError: When the download fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd-lightning" / "fashion-mnist"
    places = [Path(folder)] if folder is not None else [DEBIAN, cache]
    for place in places:
        if all((place / name).is_file() for name in SHA256):
            for name in SHA256:
                _check(place / name)
            return place
    if folder is not None:
        missing = [name for name in SHA256 if not (places[0] / name).is_file()]
        raise ValueError(f"{folder} lacks {', '.join(missing)}: expected the publisher's four files")
    cache.mkdir(parents=True, exist_ok=True)
    for name in SHA256:
        if not (cache / name).is_file():
            _download(PUBLISHER + name, cache / name)
    return cache


def read_whole_set(folder: Path) -> Arrays:
    """Read the publisher's files; of its training images the last 1,000 are for validation."""
    files = list(SHA256)
    train_images, train_labels = _idx(folder / files[0], 3), _idx(folder / files[1], 1)
    test_images, test_labels = _idx(folder / files[2], 3), _idx(folder / files[3], 1)
    cut = min(_WHOLE_TRAIN, len(train_labels) - 1)
    return {
        "train_images": train_images[:cut],
        "train_labels": train_labels[:cut],
        "val_images": train_images[cut:],
        "val_labels": train_labels[cut:],
        "test_images": test_images,
        "test_labels": test_labels,
    }


def _idx(file: Path, dims: int) -> NDArray[np.uint8]:
    """Read the publisher's format: a big-endian header of magic number and sizes, then bytes."""
    try:
        content = gzip.decompress(file.read_bytes())
        header = np.frombuffer(content, ">u4", 1 + dims)
        if header[0] != 0x800 + dims:
            raise ValueError(f"its magic number is {header[0]:#x}")
        return np.frombuffer(content, np.uint8, offset=4 * len(header)).reshape(header[1:].astype(int)).copy()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged or another file ({error}), expected the publisher's {file.name}"
        ) from error


def _check(file: Path) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256[file.name]:
        raise ValueError(
            f"{file} has the checksum {found[:12]}…, expected {SHA256[file.name][:12]}…: it is torn or another file; "
            "delete it, or name another folder"
        )


def _download(url: str, file: Path) -> None:
    part = file.with_suffix(".part")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            part.write_bytes(answer.read())
        named = part.rename(part.with_name(f"{file.name}"))
        _check(named)
    except OSError as error:
        raise OSError(
            f"{url} cannot be had ({error}): install Debian's package dataset-fashion-mnist, put the file into "
            f"{file.parent}, or use the images that come with the package (whole=False)"
        ) from error
    except ValueError:
        file.unlink(missing_ok=True)
        raise
    finally:
        part.unlink(missing_ok=True)
