"""Models of transformers, through both front doors and without a task: whose token each figure and loss is of."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import Distillation, DistillationModule
from kd_lightning.losses import KD, ForwardKL, HardLabel
from kd_lightning.tasks import Classification, LanguageModelling, TokenClassification
from tests.hugging_face import CAUSAL, LENGTH, counting, network, perfect
from tests.tiny import sgd, trainer

pytest.importorskip("transformers", exc_type=ImportError)


class Wrapped(LightningModule):
    """A module as tutorials have it: the model shifts the labels inside itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def batches(rows: dict[str, Tensor], size: int = 8) -> DataLoader:
    items = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    return DataLoader(items, batch_size=size)


def text(padding: str = "none", count: int = 128) -> dict[str, Tensor]:
    """Labels are the tokens, padding included, as many do."""
    tokens, mask = counting(count), torch.ones(count, LENGTH, dtype=torch.long)
    for row, length in enumerate(torch.arange(count) % 4):
        places = {"left": slice(0, length), "right": slice(LENGTH - length, LENGTH)}.get(padding, slice(0, 0))
        mask[row, places] = 0
    tokens = tokens * mask
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}


def through_module(student: nn.Module, teacher: nn.Module, losses: Any, data: Any, **options: Any) -> dict[str, float]:
    module = DistillationModule(student, teacher, losses, sgd, **options)
    return fit(module, data)


def through_callback(student: nn.Module, teacher: nn.Module, losses: Any, data: Any, **options: Any) -> dict[str, Any]:
    return fit(Wrapped(student), data, Distillation(teacher, losses, student="model", **options))


def fit(module: LightningModule, data: Any, *callbacks: Any) -> dict[str, float]:
    fitting = trainer(max_steps=1, val_check_interval=1, log_every_n_steps=1, callbacks=list(callbacks))
    fitting.fit(module, data, data)
    return {name: float(value) for name, value in fitting.callback_metrics.items()}


DOORS = [through_module, through_callback]
Door = Callable[..., dict[str, float]]


def by_hand(student: Any, teacher: Any, rows: dict[str, Tensor]) -> float:
    """KL of the next token's distributions, averaged over tokens that come after a token and are no padding."""
    inputs = {key: value[:8] for key, value in rows.items() if key != "labels"}
    with torch.no_grad():
        z_s, z_t = (of(**inputs).logits[:, :-1].double() for of in (student, teacher))
    mask = inputs["attention_mask"]
    kl = F.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return float(kl[(mask[:, :-1] * mask[:, 1:]) == 1].mean())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_perfect_causal_teacher_is_found_perfect(kind: str, door: Door, caplog) -> None:
    with caplog.at_level(logging.INFO):
        found = door(network(kind, seed=1), perfect(kind), {"kd": KD()}, batches(text()))
    share = re.search(r"teacher: cross-entropy .*, accuracy ([\d.]+) %, .*on 128 training passages", caplog.text)
    assert share, caplog.text
    assert float(share[1]) >= 99
    assert found["val/teacher_bits_per_token"] < 0.5


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_divergence_is_of_the_next_token_and_not_of_padding(padding: str, kind: str, door: Door) -> None:
    rows, student, teacher = text(padding), network(kind, seed=1), perfect(kind)
    expected = by_hand(student, teacher, rows)
    found = door(student, teacher, {"kl": ForwardKL()}, batches(rows), check_teacher=False)
    assert found["train/loss/kl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("door", DOORS)
def test_the_labels_are_those_that_the_model_itself_learns(door: Door) -> None:
    rows, student = text(), network(seed=1)
    first = {key: value[:8] for key, value in rows.items()}
    with torch.no_grad():
        own = float(student(**first).loss)
    found = door(student, perfect(), {"hard_label": HardLabel()}, batches(rows), check_teacher=False)
    assert found["train/loss/hard_label"] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("task", [Classification(class_dim=2), TokenClassification(), LanguageModelling(shift=False)])
def test_a_task_that_does_not_shift_is_refused_beside_a_causal_model(task: Any, door: Door) -> None:
    with pytest.raises(ValueError, match=r"labels stand at their own tokens' places.*pass task=LanguageModelling"):
        door(network(), perfect(), {"kd": KD()}, batches(text()), task=task)


@pytest.mark.parametrize("target", ["labels", lambda batch: batch["labels"]])
def test_labels_that_a_selector_takes_are_not_shifted_unseen(target: Any) -> None:
    with pytest.raises(ValueError, match=r"the targets are the tokens themselves.*shift=True"):
        through_callback(network(), perfect(), {"kd": KD()}, batches(text()), target=target)
    rows, student, teacher = text(), network(seed=1), perfect()
    expected = by_hand(student, teacher, rows)
    task = LanguageModelling(shift=True)
    found = through_callback(student, teacher, {"kl": ForwardKL()}, batches(rows), target=target, task=task)
    assert found["train/loss/kl"] == pytest.approx(expected, rel=1e-4)


def test_labels_by_another_name_than_the_tokens_are_seen_where_the_model_gets_them() -> None:
    class Renaming(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch["text"], labels=batch["labels"]).loss

    tokens = counting(16)
    callback = Distillation(perfect(), {"kd": KD()}, student="model")
    with pytest.raises(ValueError, match="labels stand at their own tokens' places"):
        fit(Renaming(network()), batches({"text": tokens, "labels": tokens.clone()}), callback)


def test_the_task_is_known_in_validation_without_a_fit() -> None:
    callback = Distillation(perfect(), {"kd": KD()}, student="model")
    evaluating = trainer(callbacks=[callback])
    evaluating.validate(Wrapped(perfect()), batches(text()), verbose=False)
    assert float(evaluating.callback_metrics["val/agreement"]) == 1
    assert isinstance(callback.task, LanguageModelling)


def test_a_decoder_with_an_encoder_is_not_shifted() -> None:
    """Its labels may be as many as the encoder's tokens, whose padding is not theirs."""
    student, teacher = network("T5", "ForConditionalGeneration"), network("T5", "ForConditionalGeneration", seed=1)
    mask = torch.ones(16, LENGTH, dtype=torch.long)
    mask[:, 6:] = 0
    rows = {"input_ids": counting(16), "attention_mask": mask, "labels": counting(16, seed=1)}
    first = {key: value[:8] for key, value in rows.items()}
    with torch.no_grad():
        z_s, z_t = (of(**first).logits.double().log_softmax(-1) for of in (student, teacher))
    expected = float((z_t.exp() * (z_t - z_s)).sum(-1).mean())
    losses = {"kl": ForwardKL(), "hard_label": HardLabel()}
    with torch.no_grad():
        own = float(student(**first).loss)
    found = through_callback(student, teacher, losses, batches(rows), check_teacher=False)
    assert found["train/loss/kl"] == pytest.approx(expected, rel=1e-4)
    assert found["train/loss/hard_label"] == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("door", DOORS)
def test_masked_tokens_count_where_they_stand(door: Door) -> None:
    student, teacher = network("Bert", "ForMaskedLM"), network("Bert", "ForMaskedLM", seed=1)
    tokens = counting(16)
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    rows = {"input_ids": tokens.masked_fill(masked, 0), "labels": tokens.masked_fill(~masked, -100)}
    first = {key: value[:8] for key, value in rows.items()}
    with torch.no_grad():
        z_s, z_t = (of(**first).logits.double()[masked[:8]].log_softmax(-1) for of in (student, teacher))
        own = float(student(**first).loss)
    losses = {"kl": ForwardKL(), "hard_label": HardLabel()}
    found = door(student, teacher, losses, batches(rows), check_teacher=False)
    assert found["train/loss/kl"] == pytest.approx(float((z_t.exp() * (z_t - z_s)).sum(-1).mean()), rel=1e-4)
    assert found["train/loss/hard_label"] == pytest.approx(own, rel=1e-5)


def test_masked_tokens_without_labels_are_none() -> None:
    tokens = counting(2)
    assert LanguageModelling(shift=False).read({"input_ids": tokens}).target is None


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("kind", "head", "labels"),
    [
        ("GPT2", "ForSequenceClassification", torch.arange(16) % 3),
        ("Bert", "ForSequenceClassification", torch.arange(16) % 3),
        ("Bert", "ForTokenClassification", counting(16) % 3),
        ("GPT2", "ForTokenClassification", counting(16) % LENGTH),  # as many classes as tokens
    ],
)
def test_classes_of_texts_and_of_tokens_need_no_task(kind: str, head: str, labels: Tensor, door: Door) -> None:
    classes = int(labels.max()) + 1 if labels.max() < 3 else LENGTH
    student, teacher = (network(kind, head, s, num_labels=classes, initializer_range=0.3) for s in (1, 2))
    rows = {"input_ids": counting(16), "labels": labels}
    first = {key: value[:8] for key, value in rows.items()}
    with torch.no_grad():
        z_s, z_t = (of(**first).logits.double().log_softmax(-1) for of in (student, teacher))
    found = door(student, teacher, {"kl": ForwardKL()}, batches(rows), check_teacher=False)
    assert found["train/loss/kl"] == pytest.approx(float((z_t.exp() * (z_t - z_s)).sum(-1).mean()), rel=1e-4)
    assert ("val/teacher_f1" in found) == (head == "ForTokenClassification")


def test_two_heads_over_positions_are_two_rows_of_logits() -> None:
    """The first and the last token of an answer: a softmax over the positions of each head."""
    student, teacher = (network("Bert", "ForQuestionAnswering", seed) for seed in (1, 2))
    rows = {"input_ids": counting(16), "start_positions": torch.arange(16) % 5, "end_positions": torch.arange(16) % 7}
    first = {key: value[:8] for key, value in rows.items()}

    def heads(output: Any) -> Tensor:
        return torch.stack((output.start_logits, output.end_logits), 1)

    def places(batch: Any) -> Tensor:
        return torch.stack((batch["start_positions"], batch["end_positions"]), 1)

    with torch.no_grad():
        z_s, z_t = (heads(of(**first)).double().log_softmax(-1) for of in (student, teacher))
        own = float(student(**first).loss)
    losses, options = {"kl": ForwardKL(), "hard_label": HardLabel()}, {"check_teacher": False}
    told = through_callback(
        student,
        teacher,
        losses,
        batches(rows),
        logits=heads,
        target=places,
        task=Classification(class_dim=2),
        **options,
    )
    student = network("Bert", "ForQuestionAnswering", 1)
    found = through_callback(student, teacher, losses, batches(rows), **options)
    assert found == told
    assert found["train/loss/kl"] == pytest.approx(float((z_t.exp() * (z_t - z_s)).sum(-1).mean()), rel=1e-4)
    assert found["train/loss/hard_label"] == pytest.approx(own, rel=1e-4)
