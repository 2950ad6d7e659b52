"""scvi-tools' variational autoencoder of single cells, and its classifier: ``pip install scvi-tools``.

Of the first, trained by its own ``SCVI.train``, the profile is distilled that is decoded, each gene's share of a cell's
counts: probabilities, so that their logarithms are logits. Their optimizers are made from the networks' parameters.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning import Distillation
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import KD, HardLabel, Hint
from kd_lightning.quantization import float_weights, quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
scvi = pytest.importorskip("scvi")
anndata = pytest.importorskip("anndata")


def cells() -> Any:
    counts = np.random.default_rng(0).poisson(2.0, size=(120, 20)).astype(np.float32)
    data = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(data)
    return data


def profile(output: Any) -> Tensor:
    """Logarithms of the genes' shares, (B, genes)."""
    return output[1]["px"].scale.log()


def fit(data: Any, width: int, *callbacks: Any) -> Any:
    scvi.settings.seed = 0
    model = scvi.model.SCVI(data, n_hidden=width, n_latent=4)
    settings = {"logger": False, "enable_progress_bar": False, "limit_train_batches": 3, "log_every_n_steps": 1}
    model.train(max_epochs=1, batch_size=32, accelerator="cpu", callbacks=list(callbacks), **settings)
    return model


def distillation(teacher: Any, **options: Any) -> Distillation:
    return Distillation(
        teacher,
        {"kd": KD(), "hint": Hint("z_encoder.encoder", "z_encoder.encoder")},
        student="module",
        logits=profile,
        **options,
    )


def test_it_is_distilled_saved_and_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write
    data = cells()
    teacher, fresh = fit(data, 32).module, Observer()
    fit(data, 16, fresh)

    seen = Observer()
    trained = fit(data, 16, distillation(teacher, task_weight=0.0), seen)
    seen.assert_trained_by("kd", "hint", student="module.")
    seen.assert_clean(fresh.module)
    trained.save(str(tmp_path / "saved"))
    loaded = scvi.model.SCVI.load(str(tmp_path / "saved"), adata=data).module  # strictly
    assert_equal(weights(loaded), weights(trained.module))

    rounded = Observer()
    fit(data, 16, distillation(teacher), QuantizationAwareTraining(), rounded)
    found = quantized_share(rounded.module.module)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.7
    fresh.module.load_state_dict(float_weights(rounded.module.state_dict()))


def test_losses_on_layers_alone_need_the_students_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write
    data, layer, seen = cells(), "z_encoder.encoder", Observer()
    teacher = fit(data, 32).module
    fit(data, 16, Distillation(teacher, {"hint": Hint(layer, layer)}, student="module", task_weight=0.0), seen)
    seen.assert_trained_by("hint", student="module.")


def test_a_classifier_of_cells() -> None:
    random = torch.Generator().manual_seed(0)
    counts, kinds = torch.poisson(torch.full((96, 20), 2.0), generator=random), torch.arange(96) % 3
    rows = [{"X": x, "labels": y[None]} for x, y in zip(counts, kinds, strict=True)]  # a column, as theirs are

    def plan(width: int) -> Any:
        seed_everything(0, verbose=False)
        return scvi.train.ClassifierTrainingPlan(scvi.module.Classifier(20, width, n_labels=3, logits=True))

    def fit(*callbacks: Any, **options: Any) -> Observer:
        layer = "classifier.0"
        losses = {"kd": KD(temperature=2.0), "hard_label": HardLabel(), "hint": Hint(layer, layer)}
        callback = Distillation(plan(32).module, losses, student="module", check_teacher=False, **options)
        seen = Observer()
        data = DataLoader(rows, batch_size=32)
        trainer(callbacks=[callback, *callbacks, seen], log_every_n_steps=1).fit(plan(16), data, data)
        return seen

    seen = fit(task_weight=0.0)
    seen.assert_trained_by("kd", "hard_label", "hint", student="module.")
    assert {"val/agreement", "val/teacher_acc"} <= set(seen.logged)
    seen.assert_clean(plan(16))
    plan(16).load_state_dict(seen.module.state_dict())

    rounded = fit(QuantizationAwareTraining())
    found = quantized_share(rounded.module.module)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.7
    plan(16).load_state_dict(float_weights(rounded.module.state_dict()))
