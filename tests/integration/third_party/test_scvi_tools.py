"""scvi-tools' variational autoencoder of single cells, trained by its own ``SCVI.train``: ``pip install scvi-tools``.

What is distilled is the profile that is decoded, each gene's share of a cell's counts: probabilities, so that their
logarithms are logits. Its optimizer is made from the network's parameters alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from kd_lightning import Distillation
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import KD, Hint
from kd_lightning.quantization import float_weights, quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, weights

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
        teacher_logits=profile,
        add_parameters=True,
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
