"""pytorch-tabular's own classifier, trained by its own ``TabularModel.fit``: ``pip install pytorch-tabular``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import KD, Hint
from kd_lightning.quantization import quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("pytorch_tabular")
pandas = pytest.importorskip("pandas")

from pytorch_tabular import TabularModel  # noqa: E402
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig  # noqa: E402
from pytorch_tabular.models import CategoryEmbeddingModelConfig  # noqa: E402


def table() -> Any:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 240))
    return pandas.DataFrame({"a": a, "b": b, "kind": random.choice(["x", "y"], 240), "label": (a + b > 0).astype(int)})


def fit(folder: Path, layers: str, *callbacks: Any) -> Any:
    model = TabularModel(
        data_config=DataConfig(target=["label"], continuous_cols=["a", "b"], categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers=layers),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=32,
            max_epochs=1,
            accelerator="cpu",
            early_stopping=None,
            checkpoints="valid_loss",
            checkpoints_path=str(folder),
            progress_bar="none",
            trainer_kwargs={"limit_train_batches": 3, "log_every_n_steps": 1},
        ),
        verbose=False,
    )
    model.fit(train=table(), validation=table(), callbacks=list(callbacks), seed=0)
    return model


def distillation(teacher: Any, **options: Any) -> Distillation:
    layer = "_backbone.linear_layers"
    losses = {"kd": KD(temperature=2.0), "hint": Hint(layer, layer)}
    return Distillation(teacher, losses, check_teacher=False, **options)


def test_it_is_distilled_saved_and_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write
    teacher = fit(tmp_path / "teacher", "32-16").model
    fresh = fit(tmp_path / "fresh", "16-8").model

    seen = Observer()
    trained = fit(tmp_path / "student", "16-8", distillation(teacher, task_weight=0.0), seen)
    seen.assert_trained_by("kd", "hint")
    assert "val/agreement" in seen.logged
    seen.assert_clean(fresh)
    trained.save_model(str(tmp_path / "saved"))  # the callbacks, too
    loaded = TabularModel.load_model(str(tmp_path / "saved")).model  # strictly
    assert_equal(weights(loaded), weights(trained.model))

    rounded = Observer()
    fit(tmp_path / "rounded", "16-8", distillation(teacher), QuantizationAwareTraining(), rounded)
    found = quantized_share(rounded.module)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.5
    (saved,) = (tmp_path / "rounded").glob("*.ckpt")
    fresh.load_state_dict(load_student(saved))
