"""neuralforecast's own models, trained and saved by its ``NeuralForecast``: ``pip install neuralforecast``.

It trains copies of the models, and of the callbacks in them.
"""

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
pytest.importorskip("neuralforecast")
pandas = pytest.importorskip("pandas")

from neuralforecast import NeuralForecast  # noqa: E402
from neuralforecast.models import MLP, NHITS  # noqa: E402


def series() -> Any:
    random = np.random.default_rng(0)
    rows = [
        {"unique_id": number, "ds": step, "y": float(np.sin(step / 3 + number) + 0.1 * random.normal())}
        for number in range(6)
        for step in range(40)
    ]
    return pandas.DataFrame(rows)


def nhits(width: int, **options: Any) -> Any:
    return NHITS(h=4, input_size=8, max_steps=3, mlp_units=3 * [[width, width]], **options)


def mlp(width: int, **options: Any) -> Any:
    return MLP(h=4, input_size=8, max_steps=3, hidden_size=width, **options)


def observer_in(forecast: Any) -> Observer:
    (found,) = (each for each in forecast.models[0].trainer_kwargs["callbacks"] if isinstance(each, Observer))
    return found


# How a model is made, and a layer.
MODELS = {"nhits": (nhits, "blocks.2.layers"), "mlp": (mlp, "mlp.1")}


@pytest.mark.parametrize(("make", "layer"), MODELS.values(), ids=MODELS)
def test_it_is_distilled_saved_and_rounded(
    make: Any, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where loggers of theirs write

    def fit(width: int, *callbacks: Any) -> Any:
        settings = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False, "logger": False}
        forecast = NeuralForecast([make(width, callbacks=list(callbacks), **settings)], freq=1)
        forecast.fit(series(), val_size=4)
        return forecast

    teacher = fit(32).models[0]

    def distillation(**options: Any) -> Distillation:
        losses = {"kd": TeacherRegression(), "hint": Hint(layer, layer)}
        return Distillation(teacher, losses, **options)

    forecast = fit(16, distillation(task_weight=0.0), Observer())
    seen = observer_in(forecast)
    seen.assert_trained_by("kd", "hint")
    seen.assert_clean(make(16))
    forecast.save(str(tmp_path), save_dataset=False)
    loaded = NeuralForecast.load(str(tmp_path)).models[0]  # strictly
    assert_equal(weights(loaded), weights(seen.module))

    rounded = observer_in(fit(16, distillation(), QuantizationAwareTraining(), Observer()))
    found = quantized_share(rounded.module)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.9
    make(16).load_state_dict(float_weights(rounded.module.state_dict()))
