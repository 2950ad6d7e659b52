"""Images of several clothes, composed of Fashion-MNIST's (Xiao et al., 2017), https://arxiv.org/abs/1708.07747."""

import numpy as np
from numpy.typing import NDArray

from kd_lightning.data.fashion_mnist import FashionMNIST
from kd_lightning.data.fashion_mnist_files import read_packaged
from kd_lightning.data.image_data import ImageData
from kd_lightning.data.in_memory import InMemory
from kd_lightning.data.split_data import SplitData, check_counts

MOST_ITEMS = 4  # one a quarter


class FashionItems(SplitData, ImageData):
    """28×28 grey images of one to four clothes each; the target says which of ten kinds are there.

    Each item is one of Fashion-MNIST's images at half its size, in a quarter of its own that it may leave by two
    pixels; where two overlap, the brighter pixel is seen. An item of the teacher's images (the first 6,000 that come
    with the package) is in none of the student's (the next 6,000); validation and test have items of their own as well.

    Args:
        teacher_images: How many images the teacher trains on.
        labelled: How many images the student gets with their labels.
        unlabelled: How many further ones the control and the distilled student get without (targets -100).
        batch_size: Size of the training's batches.
        eval_batch_size: Size of the batches of validation and test.
        num_workers: Processes that load; 0 is the fastest for images in memory.
        split_seed: Seed by which the images are composed; the same for all seeds of the training.
        role: See :class:`~kd_lightning.data.FashionMNIST`.
        seed: Seed of the order of the training images, together with the epoch.

    Shape: target (N, 10), 1 for a kind that is there, 0 for one that is not.

    >>> FashionItems(labelled=300).counts
    {'teacher': 6000, 'labelled': 300, 'unlabelled': 0, 'validation': 1000, 'test': 2500}
    """

    num_classes = FashionMNIST.num_classes
    class_names = FashionMNIST.class_names
    input_shape = (1, 28, 28)
    mean, std = (0.178,), (0.297,)

    def __init__(
        self,
        teacher_images: int = 6000,
        labelled: int = 300,
        unlabelled: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        split_seed: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        check_counts(teacher_images=teacher_images, labelled=labelled, unlabelled=unlabelled, split_seed=split_seed)
        self.teacher_images, self.labelled, self.unlabelled = teacher_images, labelled, unlabelled
        self.split_seed = split_seed

    def load_subsets(self) -> dict[str, InMemory]:
        arrays = read_packaged()
        items = {name: (arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in ("train", "val", "test")}
        teachers, pool = ((x[:6000], x[6000:]) for x in items["train"])
        mine, students = zip(teachers, pool, strict=True)
        return {
            "teacher": self._composed(*mine, self.teacher_images, 0),
            "labelled": self._composed(*students, self.labelled, 1),
            "unlabelled": self._composed(*students, self.unlabelled, 2).without_labels(),
            "validation": self._composed(*items["val"], 1000, 3),
            "test": self._composed(*items["test"], 2500, 4),
        }

    def _composed(self, items: NDArray[np.uint8], labels: NDArray[np.uint8], count: int, part: int) -> InMemory:
        random = np.random.default_rng((self.split_seed, part))
        images, target = compose(items, labels, count, random)
        return InMemory(images[:, None], target, self.mean, self.std)


def compose(
    items: NDArray[np.uint8], labels: NDArray[np.uint8], count: int, random: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images with one to four of the items, and which of the ten kinds each of them shows.

    From a generator in the same state, more images begin with the fewer ones.

    Shape: items (N, 28, 28), labels (N,); to images (count, 28, 28), target (count, 10).
    """
    drawn = random.random((count, 1 + 4 * MOST_ITEMS))  # for each image: how many; then by quarter, who, and where
    number = 1 + np.floor(MOST_ITEMS * drawn[:, 0]).astype(int)
    order, which, down, right = (drawn[:, 1 + i :: MOST_ITEMS] for i in range(4))
    shown = order.argsort(1).argsort(1) < number[:, None]
    chosen = np.floor(len(items) * which).astype(int)
    small = items.reshape(-1, 14, 2, 14, 2).mean((2, 4)).round().astype(np.uint8)
    images, target = np.zeros((count, 28, 28), np.uint8), np.zeros((count, 10), np.uint8)
    pixel = np.arange(14)
    for quarter in range(MOST_ITEMS):
        some = np.flatnonzero(shown[:, quarter])
        top, left = (
            (corner + np.floor(5 * moved[some, quarter]).astype(int) - 2).clip(0, 14)
            for corner, moved in ((14 * (quarter // 2), down), (14 * (quarter % 2), right))
        )
        window = some[:, None, None], top[:, None, None] + pixel[:, None], left[:, None, None] + pixel
        images[window] = np.maximum(images[window], small[chosen[some, quarter]])
        target[some, labels[chosen[some, quarter]]] = 1
    return images, target
