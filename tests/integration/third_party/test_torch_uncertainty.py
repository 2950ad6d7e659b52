"""torch-uncertainty's classification: ``pip install torch-uncertainty scikit-learn``.

It takes a torchvision that is built for the same torch. Its optimizer is made of the network's parameters, ahead of
the module.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import KD, Hint
from kd_lightning.quantization import quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("torch_uncertainty", exc_type=ImportError)
pytest.importorskip("sklearn")

from torch_uncertainty.models.mlp import mlp  # noqa: E402
from torch_uncertainty.routines import ClassificationRoutine  # noqa: E402

FEATURES, CLASSES = 8, 3


def network(width: int) -> Any:
    seed_everything(0, verbose=False)
    return mlp(FEATURES, CLASSES, hidden_dims=[width, width])


def routine() -> Any:
    student = network(16)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    mixed = {"mixtype": "mixup", "mixup_alpha": 0.2}
    return ClassificationRoutine(student, CLASSES, nn.CrossEntropyLoss(), optim_recipe=optimizer, mixup_params=mixed)


def points() -> DataLoader:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, FEATURES, generator=random), torch.randint(CLASSES, (96,), generator=random)
    return DataLoader(TensorDataset(x, y), batch_size=32)


def test_it_is_distilled_saved_and_rounded(tmp_path: Path) -> None:
    teacher, layer = network(32), "layers.0"

    def fit(folder: Path, *further: Any, **options: Any) -> Observer:
        losses = {"kd": KD(temperature=2.0), "hint": Hint(layer, layer)}
        callback = Distillation(teacher, losses, student="model", check_teacher=False, **options)
        seen, saving = Observer(), ModelCheckpoint(folder, "last", enable_version_counter=False)
        it = trainer(callbacks=[callback, *further, seen, saving], enable_checkpointing=True, log_every_n_steps=1)
        it.fit(routine(), points(), points())
        return seen

    seen = fit(tmp_path, task_weight=0.0)
    seen.assert_trained_by("kd", "hint", student="model.")
    assert {"val/agreement", "val/teacher_acc"} <= set(seen.logged)
    seen.assert_clean(routine())
    plain = routine()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])  # strictly
    assert_equal(weights(plain), weights(seen.module))

    rounded = fit(tmp_path / "rounded", QuantizationAwareTraining())
    found = quantized_share(rounded.module.model)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.8
    routine().load_state_dict(load_student(tmp_path / "rounded" / "last.ckpt"))
