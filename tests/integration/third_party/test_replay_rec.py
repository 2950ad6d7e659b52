"""replay-rec's SASRec in its own LightningModule: ``pip install replay-rec``.

In eval mode the network returns logits of the last item alone: a teacher's for all come out of its hidden states.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.losses import KD, Hint
from kd_lightning.quantization import quantized_share
from kd_lightning.tasks import LanguageModelling
from tests.third_party import Observer
from tests.tiny import assert_equal, trainer, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
pytest.importorskip("replay")

from replay.data import FeatureHint, FeatureSource, FeatureType  # noqa: E402
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema  # noqa: E402
from replay.nn.lightning import LightningModule  # noqa: E402
from replay.nn.sequential import SasRec  # noqa: E402

ITEMS, LENGTH = 30, 8


def network(width: int) -> Any:
    seed_everything(0, verbose=False)
    item = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=width,
        padding_value=ITEMS,
        cardinality=ITEMS,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    return SasRec.from_params(TensorSchema([item]), width, num_heads=2, max_sequence_length=LENGTH)


def sequences() -> list[dict[str, Any]]:
    """Users who take each item after the one before it; the first two places of a user are padding."""
    items = (torch.arange(LENGTH + 1) + torch.arange(48)[:, None]) % ITEMS
    items[:, :2] = ITEMS
    real = items != ITEMS
    return [
        {
            "feature_tensors": {"item_id": taken[:-1]},
            "padding_mask": mask[:-1],
            "positive_labels": taken[1:, None],
            "target_padding_mask": mask[1:, None],
        }
        for taken, mask in zip(items, real, strict=True)
    ]


def next_items(batch: Any) -> Tensor:
    return batch["positive_labels"].where(batch["target_padding_mask"], -100).squeeze(-1)


def test_it_is_distilled_saved_and_rounded(tmp_path: Path) -> None:
    teacher, batches = network(32), DataLoader(sequences(), batch_size=16)

    def fit(folder: Path, *further: Any, **options: Any) -> Observer:
        callback = Distillation(
            teacher,
            {"kd": KD(temperature=2.0), "hint": Hint("body", "body")},
            student="model",
            logits="head",
            teacher_logits=lambda output: teacher.get_logits(output["hidden_states"][0]),
            target=next_items,
            task=LanguageModelling(shift=False),
            check_teacher=False,
            **options,
        )
        seen, saving = Observer(), ModelCheckpoint(folder, "last", enable_version_counter=False)
        it = trainer(callbacks=[callback, *further, seen, saving], enable_checkpointing=True, log_every_n_steps=1)
        it.fit(LightningModule(network(16)), batches)
        return seen

    seen = fit(tmp_path, task_weight=0.0)
    seen.assert_trained_by("kd", "hint", student="model.")
    seen.assert_clean(LightningModule(network(16)))
    loaded = LightningModule.load_from_checkpoint(tmp_path / "last.ckpt", model=network(16))  # strictly
    assert_equal(weights(loaded), weights(seen.module))

    rounded = fit(tmp_path / "rounded", QuantizationAwareTraining())
    found = quantized_share(rounded.module.model)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > 0.2
    LightningModule(network(16)).load_state_dict(load_student(tmp_path / "rounded" / "last.ckpt"))


def test_losses_on_layers_alone_need_the_students_name_alone() -> None:
    seen = Observer()
    callback = Distillation(network(32), {"hint": Hint("body", "body")}, student="model", task_weight=0.0)
    it = trainer(callbacks=[callback, seen], log_every_n_steps=1)
    it.fit(LightningModule(network(16)), DataLoader(sequences(), batch_size=16))
    seen.assert_trained_by("hint", student="model.")
