"""Read Fashion-MNIST from the file that comes with the package, and from the publisher's."""

import gzip
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGED = Path(__file__).parent / "fashion_mnist_15k.npz"
_VALIDATION = 1000  # the last of the publisher's 60,000 training images

Arrays = dict[str, NDArray[np.uint8]]


@cache  # a pipeline asks for them for each stage, and in its checks before
def read_packaged(file: Path = PACKAGED) -> Arrays:
    """Read the images that come with the package: the same arrays each time, which nobody changes.

    Raises:
        ValueError: When the file is torn or another one.
    """
    names = [f"{split}_{what}" for split in ("train", "val", "test") for what in ("images", "labels")]
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in names}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is torn or another file ({error}), expected {', '.join(names)}: install the package again"
        ) from error


def read_whole_set(files: Sequence[Path]) -> Arrays:
    """Read the publisher's training images and labels, test images and labels.

    Raises:
        ValueError: For a file that is torn or another one.
    """
    train_images, train_labels, test_images, test_labels = (
        _read_idx(file, dimensions) for file, dimensions in zip(files, (3, 1, 3, 1), strict=True)
    )
    for file, images, labels in ((files[1], train_images, train_labels), (files[3], test_images, test_labels)):
        if len(images) != len(labels):
            raise ValueError(f"{file} has {len(labels)} labels for {len(images)} images, expected as many")
    if len(train_labels) <= _VALIDATION:
        raise ValueError(f"{files[1]} has {len(train_labels)} labels, expected 60,000")
    return {
        "train_images": train_images[:-_VALIDATION],
        "train_labels": train_labels[:-_VALIDATION],
        "val_images": train_images[-_VALIDATION:],
        "val_labels": train_labels[-_VALIDATION:],
        "test_images": test_images,
        "test_labels": test_labels,
    }


def _read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read the publisher's format: a big-endian header of magic number and sizes, then bytes."""
    try:
        content = gzip.decompress(file.read_bytes())
        magic, *sizes = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
        if magic != 0x800 + dimensions:
            raise ValueError(f"its magic number is {magic:#x}, expected {0x800 + dimensions:#x}")
        values: NDArray[np.uint8] = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(sizes).copy()
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is torn or another file ({error}): expected the publisher's {file.name}") from error
    return values
