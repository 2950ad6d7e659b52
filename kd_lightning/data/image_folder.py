"""Any images, sorted into a folder for each class."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.image_data import ImageData, draw
from kd_lightning.data.loaders import View, mixed


class ImageFolder(ImageData):
    """``folder/train/<class>/<image>``, likewise ``val`` and ``test``; teacher and student see all training images.

    Training images are cropped at random in size and place, and every other one mirrored; what happens to a sample is
    a function of (seed, epoch, sample). The others are resized and cropped at the centre. Needs torchvision.

    Args:
        folder: Holds ``train``, ``test`` and, unless images are to be split off ``train``, ``val``.
        crop: Height and width of the images that the networks see.
        resize: Of the shorter edge of evaluation images, before the crop.
        smallest_crop: Smallest share of a training image's area that is cropped; 1 takes whole images.
        validation: Share of the training images that is kept for validation where there is no ``val``.
        mean: Of each channel, with pixels in [0, 1]; ImageNet's unless given, as pre-trained teachers expect.
        std: Likewise.
        batch_size: Of the training.
        eval_batch_size: Of validation and test.
        num_workers: Processes that read and crop.
        split_seed: Of the draw of the validation images; the same for all seeds of the training.
        role: Of the pipeline; each sees the same images.
        seed: Of the order of the training images and of their augmentation, together with the epoch.

    Raises:
        ImportError: Without torchvision.
        ValueError: For a number out of range, a folder that is missing or has other classes than ``train``, or an
            image that is torn.
    """

    def __init__(
        self,
        folder: str | Path,
        crop: int = 224,
        resize: int = 256,
        smallest_crop: float = 0.08,
        validation: float = 0.1,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 4,
        split_seed: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        _transforms()
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"expected mean and std of three channels, std above 0, got mean {mean} and std {std}")
        for name, value in (("crop", crop), ("resize", resize)):
            if value < 1:
                raise ValueError(f"expected {name} of 1 or more, got {value}")
        if not 0 < smallest_crop <= 1:
            raise ValueError(f"expected smallest_crop in (0, 1], a share of the area, got {smallest_crop}")
        self.folder, self.crop, self.resize, self.smallest_crop = Path(folder), crop, resize, smallest_crop
        self.validation, self.mean, self.std, self.split_seed = validation, tuple(mean), tuple(std), split_seed
        self.class_names = _classes(self.folder / "train")
        self.num_classes, self.input_shape = len(self.class_names), (3, crop, crop)
        if not (self.folder / "test").is_dir():
            raise ValueError(
                f"{self.folder} lacks test: where val is what results are reported on (as for ImageNet), rename it to "
                "test, and validation images are split off train"
            )
        for other in (self.folder / "val", self.folder / "test"):
            if other.is_dir() and _classes(other) != self.class_names:
                differing = ", ".join(sorted(set(_classes(other)) ^ set(self.class_names))[:5])
                raise ValueError(f"{other} has other classes than train: {differing} in one of the two only")

    def files_read(self) -> Sequence[Path]:
        return [self.folder]

    def load_subsets(self) -> dict[str, "_Files"]:
        v2 = _transforms()
        to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        augmented = v2.Compose(
            [v2.RandomResizedCrop(self.crop, (self.smallest_crop, 1.0)), v2.RandomHorizontalFlip(), *to_tensor]
        )
        plain = v2.Compose([v2.Resize(self.resize), v2.CenterCrop(self.crop), *to_tensor])
        training, test = self._list("train"), self._list("test")
        if (self.folder / "val").is_dir():
            held_out = self._list("val")
        else:
            count = round(self.validation * len(training))
            remedy = "choose a validation share between 0 and 1, or add a folder val"
            sizes = [count, len(training) - count]
            of_validation, of_training = draw(np.arange(len(training)), sizes, self.split_seed, remedy)
            held_out = [training[i] for i in sorted(of_validation)]
            training = [training[i] for i in sorted(of_training)]
        return {
            "train": _Files(training, plain, augmented, self.seed),
            "validation": _Files(held_out, plain),
            "test": _Files(test, plain),
        }

    def _list(self, split: str) -> list[tuple[Path, int]]:
        folders = [(self.folder / split / name, target) for target, name in enumerate(self.class_names)]
        found = [(file, target) for folder, target in folders for file in sorted(folder.rglob("*")) if file.is_file()]
        return [(file, target) for file, target in found if not file.name.startswith(".")]


class _Files(Dataset[tuple[Tensor, int]]):
    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        plain: Callable[[Any], Tensor],
        augmented: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.files, self.plain, self.augmented, self.seed = files, plain, augmented, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: View | int) -> tuple[Tensor, int]:
        from PIL import Image  # comes with torchvision

        file, target = self.files[key.sample if isinstance(key, View) else key]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, by format
            raise ValueError(f"{file} is torn or no image ({error}): replace or remove it") from error
        if self.augmented is None or not isinstance(key, View):
            return self.plain(image), target
        state = torch.get_rng_state()
        # The generator that torchvision draws from; torch.manual_seed would seed a GPU's as well.
        torch.default_generator.manual_seed(mixed(self.seed, *reversed(key)))
        try:
            return self.augmented(image), target
        finally:
            torch.set_rng_state(state)

    def content(self) -> bytes:
        """Return names, sizes and targets: reading all images would take as long as an epoch."""
        kept = [(f"{file.parent.name}/{file.name}", file.stat().st_size, target) for file, target in self.files]
        return f"{kept} {self.plain} {self.augmented}".encode()


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: expected a folder for each class in it")
    found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} folders, expected one for each of two or more classes")
    return found


def _transforms() -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(f"ImageFolder needs torchvision ({error}): pip install 'kd-lightning[vision]'") from error
    return v2
