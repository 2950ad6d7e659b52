"""darts' own TiDE, trained, saved and loaded by its forecasting model: ``pip install darts``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_lightning import Distillation
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import Hint, TeacherRegression
from kd_lightning.quantization import float_weights, quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("darts")

from darts import TimeSeries  # noqa: E402
from darts.models import TiDEModel  # noqa: E402


def fit(folder: Path, width: int, *callbacks: Any) -> Any:
    settings = {"accelerator": "cpu", "log_every_n_steps": 1, "limit_train_batches": 3, "enable_progress_bar": False}
    model = TiDEModel(
        input_chunk_length=8,
        output_chunk_length=4,
        hidden_size=width,
        n_epochs=1,
        batch_size=16,
        random_state=0,
        work_dir=str(folder),
        model_name="model",
        save_checkpoints=True,
        pl_trainer_kwargs={"callbacks": list(callbacks), **settings},
    )
    values = np.sin(np.arange(80) / 3) + 0.1 * np.random.default_rng(0).normal(size=80)
    model.fit(TimeSeries.from_values(values.astype(np.float32)))
    return model


def distillation(teacher: Any, **options: Any) -> Distillation:
    losses = {"kd": TeacherRegression(), "hint": Hint("encoders", "encoders")}
    return Distillation(teacher, losses, **options)


def test_it_is_distilled_saved_and_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write
    teacher = fit(tmp_path / "teacher", 32).model
    fresh = fit(tmp_path / "fresh", 16).model

    seen = Observer()
    trained = fit(tmp_path / "student", 16, distillation(teacher, task_weight=0.0), seen)
    seen.assert_trained_by("kd", "hint")
    seen.assert_clean(fresh)
    trained.save(str(tmp_path / "saved.pt"), clean=True)
    # What is not clean holds the callbacks, classes that darts does not know, hence trusted.
    by_name = TiDEModel.load_from_checkpoint("model", str(tmp_path / "student"), best=False, trusted=True)
    for loaded in (TiDEModel.load(str(tmp_path / "saved.pt")), by_name):  # strictly
        assert_equal(weights(loaded.model), weights(seen.module))

    rounded = Observer()
    fit(tmp_path / "rounded", 16, distillation(teacher), QuantizationAwareTraining(), rounded)
    found = quantized_share(rounded.module)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.9
    fresh.load_state_dict(float_weights(rounded.module.state_dict()))
