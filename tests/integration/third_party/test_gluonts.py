"""gluonts' estimators, trained by their own ``train_model``: ``pip install 'gluonts[torch]'``.

Their loaders have no length, and their optimizers are made from the network's parameters alone. DeepAR's step never
calls its network as a whole, whose ``forward`` draws samples: the teacher is called by what unrolls it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import Hint, TeacherRegression
from kd_lightning.quantization import quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("gluonts")
pandas = pytest.importorskip("pandas")

from gluonts.dataset.common import ListDataset  # noqa: E402
from gluonts.itertools import select  # noqa: E402
from gluonts.torch import DeepAREstimator, SimpleFeedForwardEstimator  # noqa: E402


def series() -> Any:
    random = np.random.default_rng(0)
    values = np.sin(np.arange(40) / 3 + np.arange(6)[:, None]) + 2 + 0.1 * random.normal(size=(6, 40))
    start = pandas.Period("2024-01-01", freq="D")
    return ListDataset([{"start": start, "target": target} for target in values], freq="D")


def distribution(output: Any) -> Tensor:
    """The arguments of the distribution that is forecast, (B, horizon, 3): degrees of freedom, location, scale."""
    return torch.stack(output[0], dim=-1)


def fit(folder: Path, width: int, *callbacks: Any, kind: Any = SimpleFeedForwardEstimator) -> Any:
    settings = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    recurrent = kind is DeepAREstimator
    estimator = kind(
        prediction_length=4,
        context_length=8,
        batch_size=16,
        num_batches_per_epoch=3,
        trainer_kwargs={"callbacks": list(callbacks), "default_root_dir": str(folder), **settings},
        **({"freq": "D", "hidden_size": width} if recurrent else {"hidden_dimensions": [width, width]}),
    )
    return estimator.train_model(series())


def distillation(teacher: Any, **options: Any) -> Distillation:
    return Distillation(
        teacher,
        {"kd": TeacherRegression(), "hint": Hint("nn", "nn")},
        student="model",
        logits=distribution,
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


def test_losses_on_layers_alone_need_the_students_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write
    teacher, seen = fit(tmp_path / "teacher", 32).trained_net.model, Observer()
    callback = Distillation(teacher, {"hint": Hint("nn", "nn")}, student="model", task_weight=0.0)
    fit(tmp_path / "student", 16, callback, seen)
    seen.assert_trained_by("hint", student="model.")


class Unrolled(nn.Module):
    """A trained DeepAR, as what gives the location of the distribution at each step, (B, steps, 1)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.network.unroll_lagged_rnn(**inputs)[0][1][..., None]


def test_a_network_that_is_only_called_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write
    teacher = fit(tmp_path / "teacher", 32, kind=DeepAREstimator).trained_net
    fresh = fit(tmp_path / "fresh", 16, kind=DeepAREstimator).trained_net

    def unrolled(batch: Any) -> Any:
        # As the step does it: the last value that is forecast is no input.
        return {**select(teacher.inputs, batch), "future_target": batch["future_target"]}

    def distillation(**options: Any) -> Distillation:
        return Distillation(
            Unrolled(teacher.model),
            {"kd": TeacherRegression()},
            student="model",
            logits="param_proj.proj.1",
            teacher_inputs=unrolled,
            **options,
        )

    seen = Observer()
    trained = fit(tmp_path / "student", 16, distillation(task_weight=0.0), seen, kind=DeepAREstimator)
    seen.assert_trained_by("kd", student="model.")
    seen.assert_clean(fresh)
    assert len(list(trained.predictor.predict(series()))) == 6
    fresh.load_state_dict(seen.module.state_dict())

    rounded = Observer()
    fit(tmp_path / "rounded", 16, distillation(), QuantizationAwareTraining(), rounded, kind=DeepAREstimator)
    found = quantized_share(rounded.module.model)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert "LSTM" in found.in_float
    (saved,) = (tmp_path / "rounded").rglob("*.ckpt")
    fresh.load_state_dict(load_student(saved))
