"""Models of transformers by folder, whole and as an adapter. Nothing is downloaded: weights are random."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from kd_lightning import DistillationModule, Teacher
from kd_lightning.checkpoint import load_student
from kd_lightning.export import export
from kd_lightning.losses import KD, HardLabel, ReverseKL, TopKKL
from kd_lightning.models import hugging_face
from kd_lightning.models.lora import merge_lora
from kd_lightning.stored_outputs import StoredOutputs, store_outputs
from kd_lightning.tasks import LanguageModelling
from kd_lightning.teachers import Stored
from tests.hugging_face import VOCABULARY, counting, network, perfect, transformers
from tests.tiny import assert_equal, sgd, trainer, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize(
    ("kind", "architecture", "head", "shape"),
    [
        ("causal", "Qwen2", "LMHeadModel", (2, 12, VOCABULARY)),
        ("masked", "Bert", "ForMaskedLM", (2, 12, VOCABULARY)),
        ("sequence_classification", "Bert", "ForSequenceClassification", (2, 3)),
        ("token_classification", "Bert", "ForTokenClassification", (2, 12, 3)),
    ],
)
def test_a_model_of_each_kind_takes_tokens(kind: Any, architecture: str, head: str, shape: Any, tmp_path: Path) -> None:
    options = {"num_labels": 3} if "classification" in kind else {}
    saved = network(architecture, head, **options)
    saved.save_pretrained(tmp_path)
    made = hugging_face(str(tmp_path), kind)
    assert_equal(weights(made), weights(saved))
    assert made.training
    tokens = counting(2)
    given = made.eval()(tokens)
    assert given.logits.shape == shape
    assert torch.equal(given.logits, saved(input_ids=tokens).logits)
    assert given.get("past_key_values") is None


def test_weights_may_be_random_and_the_configuration_another(folder: Path) -> None:
    made = hugging_face(str(folder), pretrained=False, config={"n_layer": 1}, dtype="bfloat16", attention="eager")
    assert len(made.transformer.h) == 1
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.config._attn_implementation == "eager"


def test_a_name_that_is_not_there_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers()
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for pretrained in (True, False):
        with pytest.raises(ValueError, match=r"some/model is no folder, .*run `hf download some/model` on a machine"):
            hugging_face("some/model", pretrained=pretrained)
    with pytest.raises(ValueError, match=r"the folder .* holds no such model .*expected config.json and the weights"):
        hugging_face(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "seq2seq"}, "expected kind to be one of causal, masked, .*got 'seq2seq'"),
        ({"dtype": "int8"}, "expected dtype to be float32, bfloat16 or float16, got 'int8'"),
        ({"pretrained": False, "lora": {}}, "random weights would be others next time"),
        ({"trust_remote_code": True}, "pass revision=<its commit>"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hugging_face("some/model", **options)


def test_without_a_package_its_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft cannot be imported .*pip install 'kd-lightning\[peft\]'"):
        hugging_face(str(folder), lora={})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'kd-lightning\[transformers\]'"):
        hugging_face(str(folder))


# An adapter.


@pytest.fixture
def base(tmp_path: Path) -> str:
    pytest.importorskip("peft", exc_type=ImportError)
    network("Llama").save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def adapted(base: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return hugging_face(base, lora={"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"], **options})


def distilling(student: nn.Module) -> DistillationModule:
    return DistillationModule(student, perfect("Llama"), {"hard_label": HardLabel(), "kd": KD()}, sgd)


def data() -> DataLoader:
    tokens = counting(32, 13)
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=8)


def test_the_adapter_alone_is_trained_and_saved(base: str, tmp_path: Path) -> None:
    student, before = adapted(base), weights(network("Llama"))
    module = distilling(student)
    fit = trainer(max_epochs=2)
    fit.fit(module, data())
    optimized = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    adapter = {name for name, p in student.named_parameters() if id(p) in optimized}
    assert adapter == {name for name, _ in student.named_parameters() if "lora_" in name}
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == adapter
    frozen = {n.replace(".base_layer", ""): p for n, p in student.named_parameters() if n not in adapter}
    assert_equal(dict(frozen), {name: before[name] for name in frozen})

    fresh = adapted(base)
    tokens = counting(2)
    assert not torch.equal(fresh.eval()(tokens).logits, student.eval()(tokens).logits)
    fresh.load_state_dict(load_student(tmp_path / "last.ckpt"))
    assert torch.equal(fresh(tokens).logits, student(tokens).logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted(base).load_state_dict(dict(list(saved.items())[1:]))


def test_a_resumed_adapter_is_that_of_an_uninterrupted_training(base: str, tmp_path: Path) -> None:
    whole, cut = distilling(adapted(base, dropout=0.1)), distilling(adapted(base, dropout=0.1))
    torch.manual_seed(1)
    trainer(max_epochs=2).fit(whole, data())
    torch.manual_seed(1)
    first = trainer(max_epochs=1)
    first.fit(cut, data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = distilling(adapted(base, dropout=0.1))
    torch.manual_seed(2)
    trainer(max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "first.ckpt")
    assert_equal(weights(resumed.student), weights(whole.student))


def test_a_merged_adapter_is_a_plain_model_that_gives_the_same(base: str) -> None:
    student = adapted(base)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = student.eval()(counting(2)).logits
    merged = merge_lora(student)
    assert weights(merged).keys() == weights(network("Llama")).keys()
    torch.testing.assert_close(merged(counting(2)).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_on_top_is_trained_with_the_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft", exc_type=ImportError)
    network("Bert", "ForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    made = hugging_face(str(tmp_path), "sequence_classification", lora={"r": 2, "target_modules": ["query"]})
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < trained
    assert made.state_dict().keys() == trained


# Stored and exported.


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_best_tokens_are_stored_by_token_and_padding_does_not_count(padding: str, tmp_path: Path) -> None:
    """As from the live teacher with the same tokens known; the loss is that of the places which count alone."""
    rows, teacher = padded(padding), perfect()
    manifest = store_outputs(teacher, rows, tmp_path, format="top5", task=LanguageModelling(), batch_size=4)
    assert manifest.bytes_per_view == 12 * (5 * 4 + 4)
    stored = StoredOutputs(rows, tmp_path, teacher=teacher)
    found = {}
    for name, source, samples in (("stored", Stored(), stored), ("live", Teacher(teacher), rows)):
        module = DistillationModule(network(seed=1), source, {"kl": TopKKL(k=5)}, sgd, check_teacher=False)
        fit = trainer(max_steps=1, log_every_n_steps=1)
        fit.fit(module, DataLoader(samples, batch_size=8))
        found[name] = float(fit.callback_metrics["train/loss/kl"])
    assert found["stored"] == pytest.approx(found["live"], rel=2e-3)
    student, batch = network(seed=1), default_collate(rows[:8])
    with torch.no_grad():
        z_s, z_t = (of(**batch).logits[:, :-1].log_softmax(-1) for of in (student, teacher))
    mask = batch["attention_mask"]
    counts = (mask[:, :-1] * mask[:, 1:]) == 1
    best = z_t.topk(5, -1)
    rest_t = torch.log1p(-best.values.exp().sum(-1))
    rest_s = torch.log1p(-z_s.gather(-1, best.indices).exp().sum(-1))
    kl = (best.values.exp() * (best.values - z_s.gather(-1, best.indices))).sum(-1) + rest_t.exp() * (rest_t - rest_s)
    assert found["live"] == pytest.approx(float(kl[counts].mean()), rel=1e-3)


def padded(padding: str) -> list[dict[str, Any]]:
    tokens, mask = counting(16), torch.ones(16, 12, dtype=torch.long)
    for row in range(16):
        mask[row, (slice(0, row % 4) if padding == "left" else slice(12 - row % 4, 12))] = 0
    return [{"input_ids": t, "attention_mask": m} for t, m in zip(tokens * mask, mask, strict=True)]


def test_a_loss_that_needs_all_tokens_logits_is_refused_by_name(tmp_path: Path) -> None:
    rows, teacher = padded("right"), perfect()
    store_outputs(teacher, rows, tmp_path, format="top5", task=LanguageModelling())
    stored = StoredOutputs(rows, tmp_path, teacher=teacher)
    module = DistillationModule(network(), Stored(), {"kd": KD(), "reverse": ReverseKL()}, sgd, check_teacher=False)
    with pytest.raises(ValueError, match=r"\['reverse'\].*5 best.*take kd, forward_kl, top_k_kl"):
        trainer(max_steps=1).fit(module, DataLoader(stored, batch_size=8))


@pytest.mark.parametrize(("kind", "masked"), [("Llama", False), ("Qwen2", True), ("GPT2", True)])
def test_a_causal_model_is_exported_to_onnx(kind: str, masked: bool, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, exc_type=ImportError)
    tokens = counting(8)
    example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} if masked else tokens
    report = export(perfect(kind), example, tmp_path / "student.onnx")
    assert report.agreement == 1
    assert report.max_difference < 1e-3


def test_an_adapter_is_merged_where_it_is_exported(base: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, exc_type=ImportError)
    student = adapted(base)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    plain = export(network("Llama"), counting(8), tmp_path / "plain.onnx").operators
    report = export(student, counting(8), tmp_path / "student.onnx")
    assert report.max_difference < 1e-3
    assert [report.operators[kind] for kind in ("MatMul", "Gemm")] == [plain[kind] for kind in ("MatMul", "Gemm")]
    assert "lora_A" in "".join(student.state_dict())  # the student stays as it is
