"""Teachers by name. Nothing is downloaded: weights are random, configurations written here."""

import json
import logging
import sys
from typing import Any

import pytest
import torch

from kd_lightning import Teacher
from kd_lightning.tasks import Classification
from kd_lightning.teachers import from_timm, from_torchvision, from_transformers
from tests.tiny import assert_equal, weights

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def usable(package: str) -> Any:
    """Skip where a package is not there, or is not usable beside this torch."""
    try:
        return __import__(package)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{package} cannot be used here: {str(error).splitlines()[0]}")


@pytest.mark.parametrize(
    ("function", "package", "extra"),
    [
        (from_timm, "timm", "timm"),
        (from_torchvision, "torchvision.models", "vision"),
        (from_transformers, "transformers", "transformers"),
    ],
)
def test_without_the_package_the_extra_is_named(function: Any, package: str, extra: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what cannot be imported
    name = package.partition(".")[0]
    with pytest.raises(ImportError, match=rf"^{name} cannot be imported .*pip install 'kd-lightning\[{extra}\]'"):
        function("anything")


def test_a_model_of_timm_says_what_its_weights_expect(caplog) -> None:
    usable("timm")
    with caplog.at_level(logging.INFO):
        teacher = from_timm("resnet10t", pretrained=False, num_classes=4)
    assert isinstance(teacher, Teacher)
    assert teacher(Classification().read((IMAGES, torch.tensor([0, 1])))).logits.shape == (2, 4)
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert "teacher resnet10t: trained on 3×176×176 inputs, normalised with mean [0.485, 0.456, 0.406]" in caplog.text


def test_a_model_that_timm_has_not_is_refused_with_the_nearest() -> None:
    usable("timm")
    with pytest.raises(ValueError, match=r"timm has no model 'resnet10', expected .*nearest: .*resnet1"):
        from_timm("resnet10", pretrained=False)


def test_a_model_of_torchvision_takes_weights_of_ones_own(tmp_path) -> None:
    usable("torchvision")
    one = from_torchvision("resnet18", weights=None, num_classes=4)
    assert one(Classification().read(IMAGES)).logits.shape == (2, 4)
    torch.save(one.network.state_dict(), tmp_path / "own.pt")
    other = from_torchvision("resnet18", weights=None, checkpoint=tmp_path / "own.pt", num_classes=4)
    assert_equal(weights(other.network), weights(one.network))


def test_a_model_or_weights_that_torchvision_has_not_are_refused_with_the_nearest() -> None:
    usable("torchvision")
    with pytest.raises(ValueError, match=r"torchvision has no model 'resnt18', .*nearest: resnet18"):
        from_torchvision("resnt18", weights=None)
    with pytest.raises(ValueError, match=r"torchvision's resnet18 has no weights 'V2', .*nearest: .*IMAGENET1K_V1"):
        from_torchvision("resnet18", weights="V2")


def vit(folder: Any) -> Any:
    transformers = usable("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        num_labels=4,
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)
    return model


def test_an_image_model_of_transformers_comes_with_its_weights_or_without(tmp_path) -> None:
    saved = vit(tmp_path)
    teacher = from_transformers(str(tmp_path))
    assert_equal(weights(teacher.network), weights(saved))
    logits = teacher(Classification().read((IMAGES, torch.tensor([0, 1])))).logits
    named = {"pixel_values": IMAGES, "labels": torch.tensor([0, 1])}
    assert torch.equal(logits, teacher(Classification().read(named)).logits)
    assert logits.shape == (2, 4)
    fresh = from_transformers(str(tmp_path), pretrained=False, num_labels=7)
    assert fresh(Classification().read(IMAGES)).logits.shape == (2, 7)


def test_a_language_model_of_transformers_gives_logits_of_tokens_and_layers(tmp_path) -> None:
    transformers = usable("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    teacher = from_transformers(str(tmp_path), head="AutoModelForCausalLM")
    batch = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3), "labels": torch.zeros(2, 3)}
    given = teacher(Classification().read(batch), ["transformer.ln_f"])
    assert given.logits.shape == (2, 3, 11)
    assert given.features["transformer.ln_f"].shape == (2, 3, 8)


def test_a_head_that_transformers_has_not_is_refused_with_the_nearest(tmp_path) -> None:
    usable("transformers")
    with pytest.raises(ValueError, match=r"has no head 'AutoModelForImages', .*nearest: AutoModelForImage"):
        from_transformers("anything", head="AutoModelForImages")


CODE = """
import pathlib, torch, transformers
pathlib.Path({mark!r}).touch()

class Config(transformers.PretrainedConfig):
    model_type = "own"

class Model(transformers.PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(3, 2)
        self.post_init()
    def forward(self, pixel_values):
        return self.head(pixel_values.mean((2, 3)))
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch) -> Any:
    """A folder with a model that is made by a Python file beside it; ``ran`` is there once that has run."""
    usable("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    heads = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": heads}))
    return folder


@pytest.mark.parametrize("pretrained", [True, False])
def test_code_that_comes_with_a_model_is_not_run(with_code, pretrained: bool) -> None:
    with pytest.raises(ValueError, match=r"is made by Python files that come with it, expected .*read these files"):
        from_transformers(str(with_code), pretrained=pretrained)
    assert not with_code.with_name("ran").exists()


def test_code_that_comes_with_a_model_is_run_where_it_is_trusted(with_code) -> None:
    teacher = from_transformers(str(with_code), pretrained=False, trust_remote_code=True)
    assert teacher(Classification().read(IMAGES)).logits.shape == (2, 2)
    assert with_code.with_name("ran").exists()


def test_code_from_the_hub_is_trusted_in_the_version_that_was_read() -> None:
    with pytest.raises(ValueError, match=r"runs whatever code some/model has today, .*pass revision=<its commit>"):
        from_transformers("some/model", trust_remote_code=True)
    with pytest.raises(ValueError, match="timm runs no code that comes with a model"):
        from_timm("resnet10t", pretrained=False, trust_remote_code=True)
