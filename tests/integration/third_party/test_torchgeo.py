"""torchgeo's segmentation of images: ``pip install torchgeo``, beside a torchvision that is built for the same torch.

Its batches are mappings of ``image`` and ``mask``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import KD, HardLabel, Hint
from kd_lightning.quantization import quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("torchgeo")

from torchgeo.trainers import SemanticSegmentationTask  # noqa: E402

CLASSES = 4


def task(backbone: str) -> Any:
    seed_everything(0, verbose=False)
    return SemanticSegmentationTask(model="unet", backbone=backbone, in_channels=3, num_classes=CLASSES)


def images() -> DataLoader:
    random = torch.Generator().manual_seed(0)
    rows = [
        {"image": torch.randn(3, 32, 32, generator=random), "mask": torch.randint(CLASSES, (32, 32), generator=random)}
        for _ in range(16)
    ]
    return DataLoader(rows, batch_size=8)


def test_it_is_distilled_saved_and_rounded(tmp_path: Path) -> None:
    teacher, layer = task("resnet34").model, "decoder.blocks.4"

    def fit(folder: Path, *further: Any, **options: Any) -> Observer:
        losses = {"kd": KD(temperature=2.0), "hard_label": HardLabel(), "hint": Hint(layer, layer)}
        callback = Distillation(teacher, losses, student="model", check_teacher=False, **options)
        seen, saving = Observer(), ModelCheckpoint(folder, "last", enable_version_counter=False)
        it = trainer(callbacks=[callback, *further, seen, saving], enable_checkpointing=True, log_every_n_steps=1)
        it.fit(task("resnet18"), images(), images())
        return seen

    seen = fit(tmp_path, task_weight=0.0)
    seen.assert_trained_by("kd", "hard_label", "hint", student="model.")
    assert {"val/agreement", "val/teacher_acc"} <= set(seen.logged)
    seen.assert_clean(task("resnet18"))
    loaded = SemanticSegmentationTask.load_from_checkpoint(tmp_path / "last.ckpt")  # strictly
    assert_equal(weights(loaded), weights(seen.module))

    rounded = fit(tmp_path / "rounded", QuantizationAwareTraining())
    found = quantized_share(rounded.module.model)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.9
    task("resnet18").load_state_dict(load_student(tmp_path / "rounded" / "last.ckpt"))
