"""gluonts' feed-forward estimator, trained by its own ``train_model``: ``pip install 'gluonts[torch]'``.

Its loaders have no length, and its optimizer is made from the network's parameters alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import Hint, TeacherRegression
from kd_lightning.quantization import quantized_share
from kd_lightning.tasks import Regression
from tests.third_party import Observer
from tests.tiny import assert_equal, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("gluonts")
pandas = pytest.importorskip("pandas")

from gluonts.dataset.common import ListDataset  # noqa: E402
from gluonts.torch import SimpleFeedForwardEstimator  # noqa: E402


def series() -> Any:
    random = np.random.default_rng(0)
    values = np.sin(np.arange(40) / 3 + np.arange(6)[:, None]) + 2 + 0.1 * random.normal(size=(6, 40))
    start = pandas.Period("2024-01-01", freq="D")
    return ListDataset([{"start": start, "target": target} for target in values], freq="D")


def distribution(output: Any) -> Tensor:
    """The arguments of the distribution that is forecast, (B, horizon, 3): degrees of freedom, location, scale."""
    return torch.stack(output[0], dim=-1)


def fit(folder: Path, width: int, *callbacks: Any) -> Any:
    settings = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    estimator = SimpleFeedForwardEstimator(
        prediction_length=4,
        context_length=8,
        hidden_dimensions=[width, width],
        batch_size=16,
        num_batches_per_epoch=3,
        trainer_kwargs={"callbacks": list(callbacks), "default_root_dir": str(folder), **settings},
    )
    return estimator.train_model(series())


def distillation(teacher: Any, **options: Any) -> Distillation:
    return Distillation(
        teacher,
        {"kd": TeacherRegression(), "hint": Hint("nn", "nn")},
        student="model",
        logits=distribution,
        teacher_logits=distribution,
        task=Regression(),
        add_parameters=True,
        **options,
    )


def test_it_is_distilled_saved_and_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write
    teacher = fit(tmp_path / "teacher", 32).trained_net.model
    fresh = fit(tmp_path / "fresh", 16).trained_net

    seen = Observer()
    trained = fit(tmp_path / "student", 16, distillation(teacher, task_weight=0.0), seen)
    seen.assert_trained_by("kd", "hint", student="model.")
    seen.assert_clean(fresh)
    assert len(list(trained.predictor.predict(series()))) == 6
    (saved,) = (tmp_path / "student").rglob("*.ckpt")
    fresh.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])  # strictly; as train_model itself does
    assert_equal(weights(fresh), weights(seen.module))

    rounded = Observer()
    fit(tmp_path / "rounded", 16, distillation(teacher), QuantizationAwareTraining(), rounded)
    found = quantized_share(rounded.module.model)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.9
    (saved,) = (tmp_path / "rounded").rglob("*.ckpt")
    fresh.load_state_dict(load_student(saved))
