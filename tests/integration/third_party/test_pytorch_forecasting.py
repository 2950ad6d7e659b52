"""pytorch-forecasting's own networks, made by their ``from_dataset``: ``pip install pytorch-forecasting``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import Hint, TeacherRegression
from kd_lightning.quantization import quantized_share
from tests.third_party import Observer
from tests.tiny import assert_equal, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("pytorch_forecasting")
pandas = pytest.importorskip("pandas")

from pytorch_forecasting import DecoderMLP, NHiTS, TemporalFusionTransformer, TimeSeriesDataSet  # noqa: E402


def series() -> Any:
    random = np.random.default_rng(0)
    rows = [
        {"series": str(number), "step": step, "value": float(np.sin(step / 3 + number) + 0.1 * random.normal())}
        for number in range(6)
        for step in range(40)
    ]
    return TimeSeriesDataSet(
        pandas.DataFrame(rows),
        time_idx="step",
        target="value",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=4,
        time_varying_known_reals=["step"],
        time_varying_unknown_reals=["value"],
    )


# The class, its arguments for a teacher and a student, a layer, and the share that is rounded.
MODELS: dict[str, Any] = {
    "tft": (TemporalFusionTransformer, {"hidden_size": 16}, {"hidden_size": 8}, "pos_wise_ff", 0.5),
    "decoder_mlp": (DecoderMLP, {"hidden_size": 32}, {"hidden_size": 16}, "mlp", 0.8),
    "nhits": (NHiTS, {"hidden_size": 32}, {"hidden_size": 16}, "model.blocks.0.layers", 0.9),
}


@pytest.mark.parametrize(("kind", "large", "small", "layer", "share"), MODELS.values(), ids=MODELS)
def test_it_is_distilled_saved_and_rounded(
    kind: Any, large: dict[str, Any], small: dict[str, Any], layer: str, share: float, tmp_path: Path
) -> None:
    data = series()
    batches, evaluated = data.to_dataloader(batch_size=16), data.to_dataloader(train=False, batch_size=64)

    def made(sizes: dict[str, Any]) -> Any:
        seed_everything(0, verbose=False)
        return kind.from_dataset(data, learning_rate=1e-3, **sizes)

    def fit(folder: Path, *further: Any, **options: Any) -> Observer:
        losses = {"kd": TeacherRegression(), "hint": Hint(layer, layer)}
        callback = Distillation(made(large), losses, **options)
        seen, saving = Observer(), ModelCheckpoint(folder, "last", enable_version_counter=False)
        settings = {"limit_train_batches": 3, "limit_val_batches": 1, "log_every_n_steps": 1}
        it = trainer(callbacks=[callback, *further, seen, saving], enable_checkpointing=True, **settings)
        it.fit(made(small), batches, evaluated)
        return seen

    seen = fit(tmp_path, task_weight=0.0)
    seen.assert_trained_by("kd", "hint")
    seen.assert_clean(made(small))
    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)  # strictly
    assert_equal(weights(loaded), weights(seen.module))

    rounded = fit(tmp_path / "rounded", QuantizationAwareTraining())
    found = quantized_share(rounded.module)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > share
    made(small).load_state_dict(load_student(tmp_path / "rounded" / "last.ckpt"))
