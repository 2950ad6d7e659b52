"""Fashion-MNIST (Xiao et al., 2017), https://arxiv.org/abs/1708.07747; the images are under the MIT licence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.download import cache_folder, check, download
from kd_lightning.data.fashion_mnist_files import Arrays, read_packaged, read_whole_set
from kd_lightning.data.image_data import ImageData, draw
from kd_lightning.data.in_memory import InMemory
from kd_lightning.data.split_data import SplitData, check_counts


class FashionMNIST(SplitData, ImageData):
    """28×28 grey images of ten kinds of clothes, divided among teacher and student.

    The teacher's images are the first of the training images, the student's pool those after them. The labelled and
    the unlabelled ones are drawn from the pool at random, not class by class, as they would come in practice.
    Validation and test images are nobody's to train on.

    Args:
        teacher_images: How many the teacher trains on.
        labelled: How many of the pool the student gets with their labels.
        unlabelled: How many further ones the control and the distilled student get without (target -100).
        exclude_classes: Classes of which the student gets no image; the teacher, validation and test keep them.
        share_images: Whether the pool is the teacher's own images.
        folder: Where the publisher's four ``.gz`` files are; implies ``whole``.
        whole: Take the publisher's 60,000 + 10,000 images (the last 1,000 of the 60,000 for validation) in place of the
            12,000 + 1,000 + 2,500 that come with the package. Without a ``folder`` they are looked for where Debian's
            package dataset-fashion-mnist puts them, then in the cache, and else downloaded.
        batch_size: Of the training.
        eval_batch_size: Of validation and test.
        num_workers: Processes that load; 0 is the fastest for images in memory.
        split_seed: Of the draw; the same for all seeds of the training.
        role: Whose training images ``train_dataloader`` gives: ``teacher``, ``student`` (labelled only), ``control`` or
            ``distilled`` (labelled and unlabelled).
        seed: Of the order of the training images, together with the epoch.

    Raises:
        ValueError: For more images than there are, a torn or foreign file, an unknown role or class.
        OSError: When the whole set is neither on disk nor can be downloaded.

    >>> FashionMNIST(labelled=300).counts
    {'teacher': 6000, 'labelled': 300, 'unlabelled': 0, 'validation': 1000, 'test': 2500}
    """

    num_classes = 10
    class_names = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
    input_shape = (1, 28, 28)
    mean, std = (0.2860,), (0.3530,)  # of the 60,000 training images

    publisher: ClassVar[str] = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    debian: ClassVar[Path] = Path("/usr/share/datasets/fashion-mnist")
    sha256: ClassVar[Mapping[str, str]] = {
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    }

    def __init__(
        self,
        teacher_images: int = 6000,
        labelled: int = 300,
        unlabelled: int = 0,
        exclude_classes: Sequence[int] = (),
        share_images: bool = False,
        folder: str | Path | None = None,
        whole: bool = False,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        split_seed: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        wrong = [c for c in exclude_classes if c not in range(self.num_classes)]
        if wrong:
            raise ValueError(f"expected exclude_classes among 0 to {self.num_classes - 1}, got {wrong}")
        check_counts(teacher_images=teacher_images, labelled=labelled, unlabelled=unlabelled)
        self.teacher_images, self.labelled, self.unlabelled = teacher_images, labelled, unlabelled
        self.exclude_classes, self.share_images = tuple(exclude_classes), share_images
        self.folder, self.whole = folder, whole or folder is not None
        self.split_seed = split_seed

    def files_read(self) -> Sequence[Path]:
        return self._whole_set() if self.whole else ()

    def prepare_data(self) -> None:
        if self.whole:
            self._whole_set()

    def load_subsets(self) -> dict[str, InMemory]:
        arrays = read_whole_set(self._whole_set()) if self.whole else read_packaged()
        labels = arrays["train_labels"]
        if not 0 <= self.teacher_images <= len(labels):
            more = "" if self.whole else ", or take the whole set (whole=True)"
            raise ValueError(
                f"expected teacher_images up to {len(labels)}, got {self.teacher_images}: ask for fewer{more}"
            )
        teacher = np.arange(self.teacher_images)
        pool = teacher if self.share_images else np.arange(self.teacher_images, len(labels))
        pool = pool[~np.isin(labels[pool], self.exclude_classes)]
        remedy = "ask for fewer labelled + unlabelled" + ("" if self.whole else ", or take the whole set (whole=True)")
        labelled, unlabelled = draw(pool, [self.labelled, self.unlabelled], self.split_seed, remedy)
        return {
            "teacher": self._subset(arrays, "train", teacher),
            "labelled": self._subset(arrays, "train", labelled),
            "unlabelled": self._subset(arrays, "train", unlabelled).without_labels(),
            "validation": self._subset(arrays, "val"),
            "test": self._subset(arrays, "test"),
        }

    def _subset(self, arrays: Arrays, split: str, samples: slice | NDArray[np.int64] = slice(None)) -> InMemory:
        images, labels = arrays[f"{split}_images"][samples], arrays[f"{split}_labels"][samples]
        return InMemory(images[:, None], labels, self.mean, self.std)

    def _whole_set(self) -> list[Path]:
        """Return the publisher's four files, downloading what is nowhere."""
        if self.folder is not None:
            files = [Path(self.folder) / name for name in self.sha256]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(f"{self.folder} lacks {', '.join(missing)}: expected the publisher's four files")
        else:
            files = [self.debian / name for name in self.sha256]
            if not all(file.is_file() for file in files):
                files = [cache_folder("fashion-mnist") / name for name in self.sha256]
        for file, expected in zip(files, self.sha256.values(), strict=True):
            if file.is_file():
                check(file, expected)
            else:
                remedy = (
                    f"install Debian's package dataset-fashion-mnist, put the file into {file.parent}, or use the "
                    "images that come with the package (whole=False)"
                )
                download(self.publisher + file.name, file, expected, remedy=remedy)
        return files
