"""Hugging Face's models in a LightningModule as tutorials write it: ``self.model(**batch).loss``, and no edit.

Random weights and made-up data: what is tried is how the callback attaches, not how well anything learns.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from kd_lightning import Distillation, load_student
from kd_lightning.callbacks import QuantizationAwareTraining, TemperatureSchedule
from kd_lightning.losses import KD, Hint
from kd_lightning.quantization import quantized_share
from kd_lightning.schedules import linear
from tests.tiny import trainer, weights

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
RANDOM = torch.Generator().manual_seed(0)


class Theirs(LightningModule):
    def __init__(self, make: Any, width: int) -> None:
        super().__init__()
        self.model = make(width)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def bert(width: int) -> Any:
    sizes = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    config = transformers.BertConfig(hidden_size=width, max_position_embeddings=16, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config)


def gpt2(width: int) -> Any:
    sizes = {"vocab_size": 60, "n_positions": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=width, **sizes))


def vit(width: int) -> Any:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    config = transformers.ViTConfig(hidden_size=width, image_size=16, patch_size=8, num_labels=3, **sizes)
    return transformers.ViTForImageClassification(config)


def answering(width: int) -> Any:
    sizes = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * width}
    config = transformers.BertConfig(hidden_size=width, max_position_embeddings=16, **sizes)
    return transformers.BertForQuestionAnswering(config)


def t5(width: int) -> Any:
    sizes = {"vocab_size": 60, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=width, decoder_start_token_id=0, **sizes)
    )


def segformer(width: int) -> Any:
    sizes = {"depths": [1, 1], "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        hidden_sizes=[width // 2, width],
        num_attention_heads=[1, 2],
        decoder_hidden_size=width,
        num_labels=3,
        **sizes,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def sentences() -> list[dict[str, Any]]:
    tokens, classes = torch.randint(60, (32, 12), generator=RANDOM), torch.randint(3, (32,), generator=RANDOM)
    return [
        {"input_ids": x, "attention_mask": torch.ones(12, dtype=torch.long), "labels": y}
        for x, y in zip(tokens, classes, strict=True)
    ]


def texts() -> list[dict[str, Any]]:
    return [{"input_ids": x, "labels": x} for x in torch.randint(60, (32, 12), generator=RANDOM)]


def images() -> list[dict[str, Any]]:
    pixels, classes = torch.randn(32, 3, 16, 16, generator=RANDOM), torch.randint(3, (32,), generator=RANDOM)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, classes, strict=True)]


def questions() -> list[dict[str, Any]]:
    ends = torch.randint(12, (32, 2), generator=RANDOM).sort(1).values
    return [
        {"input_ids": x, "start_positions": start, "end_positions": end}
        for x, (start, end) in zip(torch.randint(60, (32, 12), generator=RANDOM), ends, strict=True)
    ]


def scenes() -> list[dict[str, Any]]:
    pixels = torch.randn(16, 3, 32, 32, generator=RANDOM)
    classes = torch.randint(3, (16, 32, 32), generator=RANDOM)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, classes, strict=True)]


# How a model is made, its data, a layer, and the share that is rounded. Of the callback's arguments none is needed.
MODELS: dict[str, Any] = {
    "bert": (bert, sentences, "bert.encoder.layer.1.output", 0.7),
    "gpt2": (gpt2, texts, "transformer.h.1.mlp", 0.8),
    "vit": (vit, images, "vit.layers.1.mlp", 0.7),
    "question answering": (answering, questions, "bert.encoder.layer.1.output", 0.7),
    "t5": (t5, texts, "encoder.block.1.layer.1", 0.7),
    "segformer": (segformer, scenes, "decode_head.batch_norm", 0.7),
}
MORE = [pytest.param(*MODELS[name], id=name, marks=pytest.mark.integration) for name in list(MODELS)[3:]]


@pytest.mark.parametrize(
    ("make", "data", "layer", "share"),
    [*(pytest.param(*MODELS[name], id=name) for name in list(MODELS)[:3]), *MORE],
)
def test_it_is_distilled_saved_resumed_and_rounded(
    make: Any, data: Any, layer: str, share: float, tmp_path: Path
) -> None:
    batches = DataLoader(data(), batch_size=8)
    seed_everything(1, verbose=False)
    teacher = make(32)

    def fit(folder: Path, *further: Any, **how: Any) -> tuple[Theirs, Any]:
        seed_everything(0, verbose=False)
        module = Theirs(make, 16)
        losses = {"kd": KD(temperature=2.0), "hint": Hint(layer, layer)}
        distillation = Distillation(teacher, losses, student="model", check_teacher=False)
        saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
        settings = {"max_epochs": 2, "log_every_n_steps": 1, "enable_checkpointing": True}
        it = trainer(callbacks=[distillation, TemperatureSchedule(linear(4.0, 1.0)), *further, saving], **settings)
        it.fit(module, batches, batches, **how)
        return module, it.callback_metrics

    module, logged = fit(tmp_path)
    assert {"train/loss/kd", "train/loss/hint", "val/agreement", "train_loss", "val_loss"} <= set(logged)
    assert logged["train/loss/kd"] > 0
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    plain = Theirs(make, 16)
    plain.load_state_dict(state)  # strictly

    resumed, _ = fit(tmp_path / "again", ckpt_path=tmp_path / "epoch=0.ckpt")
    torch.testing.assert_close(weights(resumed), weights(module), rtol=0, atol=0)

    rounded, _ = fit(tmp_path / "rounded", QuantizationAwareTraining())
    found = quantized_share(rounded.model)
    print(f"{found.quantized} of {found.total} parameters rounded; in float: {found.in_float}")
    assert found.quantized / found.total > share
    Theirs(make, 16).load_state_dict(load_student(tmp_path / "rounded" / "epoch=1.ckpt"))


def test_the_kd_of_a_language_model_is_that_of_the_next_tokens() -> None:
    """A perfect teacher has a loss of zero, and the logits are those that stand where the labels do."""
    seed_everything(0, verbose=False)
    module = Theirs(gpt2, 16)
    module.model.eval()
    copied = gpt2(16)
    copied.load_state_dict(module.model.state_dict())
    callback = Distillation(copied, {"kd": KD()}, "model", check_teacher=False)
    batches = DataLoader(texts(), batch_size=8)
    it = trainer(callbacks=[callback], max_steps=1, log_every_n_steps=1)
    it.fit(module, batches, batches)
    assert abs(float(it.callback_metrics["train/loss/kd"])) < 1e-6
