"""Images that fit into memory: a batch is one indexing."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from kd_lightning.data.loaders import Batched, mixed
from kd_lightning.tasks.batch import IGNORE_INDEX


class CropAndFlip:
    """Crop at a random place of the zero-padded image, and mirror every other one (He et al., 2016, section 4.2).

    What happens to a sample is a function of (seed, epoch, sample): the same whatever the batch, the workers and the
    processes are, and after a resume.
    """

    def __init__(self, samples: int, seed: int, padding: int = 4) -> None:
        self.samples, self.seed, self.padding = samples, seed, padding
        self._drawn: tuple[int, Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, samples: Sequence[int], epoch: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != epoch:
            random = torch.Generator().manual_seed(mixed(self.seed, epoch))
            corners = torch.randint(2 * self.padding + 1, (self.samples, 2), generator=random)
            self._drawn = epoch, corners, torch.rand(self.samples, generator=random) < 0.5
        _, corners, mirror = self._drawn
        return crop_and_flip(images, self.padding, corners[samples], mirror[samples])


def crop_and_flip(images: Tensor, padding: int, corners: Tensor, mirror: Tensor) -> Tensor:
    """Cut the image's size out of the padded image, with the upper left corner at a row and a column of it.

    Shape: images (B, C, H, W), corners (B, 2) in 0 to 2·padding, mirror (B,) of bool; to (B, C, H, W).
    """
    height, width = images.shape[-2:]
    rows = corners[:, :1] + torch.arange(height)
    columns = corners[:, 1:] + torch.arange(width)
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    batch = torch.arange(len(images))[:, None, None]
    cut = pad(images, [padding] * 4)[batch, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return cut.permute(0, 3, 1, 2).contiguous()


class InMemory(Batched):
    """Images as bytes and their targets; a batch comes as float32, each channel with ``mean`` 0 and ``std`` 1.

    Shape: images (N, C, H, W) of uint8, target (N, ...): whole numbers of any type, which become int64, or float32.
    """

    def __init__(
        self,
        images: NDArray[Any] | Tensor,
        target: NDArray[Any] | Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment: CropAndFlip | None = None,
    ) -> None:
        self.images, self.target = torch.as_tensor(images), as_target(target)
        self.mean, self.std = (255 * torch.tensor(value)[:, None, None] for value in (mean, std))
        self.augment = augment

    @property
    def deterministic(self) -> bool:
        return self.augment is None

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, samples: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        images = self.images[samples]
        if self.augment is not None and epoch is not None:
            images = self.augment(images, samples, epoch)
        return (images - self.mean) / self.std, self.target[samples]

    def content(self) -> bytes:
        """Return all that a fingerprint depends on."""
        augmented = b"" if self.augment is None else f"crop and flip, {self.augment.padding}".encode()
        return self.images.numpy().tobytes() + self.target.numpy().tobytes() + augmented

    def joined(self, other: "InMemory") -> "InMemory":
        """Return the samples of both, with this one's normalisation and without augmentation."""
        both = copy(self)
        both.images, both.target = torch.cat([self.images, other.images]), torch.cat([self.target, other.target])
        both.augment = None
        return both

    def without_labels(self) -> "InMemory":
        """Return the same samples with targets that say that there is no label."""
        bare = copy(self)
        bare.target = no_labels(self.target)
        return bare


def as_target(target: NDArray[Any] | Tensor) -> Tensor:
    """Return classes and labels as int64, values as float32."""
    given = torch.as_tensor(target)
    return given.float() if given.is_floating_point() else given.long()


def no_labels(target: Tensor) -> Tensor:
    """Return the target of as many samples without label: -100 for classes and labels, NaN for values."""
    return torch.full_like(target, torch.nan if target.is_floating_point() else IGNORE_INDEX)
