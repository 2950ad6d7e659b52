"""A user's LightningDataModule, with three loaders and nothing else, through whole pipelines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import onnxruntime
import pytest
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kd_lightning.cli import conf_dir
from kd_lightning.configuration.assembling import pipeline
from kd_lightning.records import Verdict
from kd_lightning.stored_outputs import verify
from tests.tiny import Network, loader, samples

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")

TINY = [
    "logger=null",
    "seeds=[0]",
    "trainer.max_steps=60",
    "teacher.trainer.max_steps=120",
    "trainer.check_val_every_n_epoch=50",
    "optimizer.lr=0.02",
    "teacher.optimizer.lr=0.02",
]


class Plain(LightningDataModule):
    """Knows of no role and no seed, has no fingerprint, and shuffles as most people do."""

    def train_dataloader(self) -> DataLoader:
        return loader(64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return loader(120, seed=1)

    def test_dataloader(self) -> DataLoader:
        return loader(160, seed=2)


class Rows(Dataset[dict[str, Any]]):
    """Samples as Hugging Face's data sets give them; the mask says how many of the numbers count."""

    def __init__(self, count: int, seed: int) -> None:
        self.x, self.y = samples(count, seed)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"numbers": self.x[i], "mask": torch.ones(self.x.shape[1], dtype=torch.int64), "labels": int(self.y[i])}


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A function of one's own, that takes the samples as they are."""
    assert {type(row) for row in rows} == {dict}
    named = {name: torch.stack([row[name] for row in rows]) for name in ("numbers", "mask")}
    return {**named, "labels": torch.tensor([row["labels"] for row in rows])}


class Mappings(LightningDataModule):
    def _loader(self, count: int, seed: int, **options: Any) -> DataLoader:
        return DataLoader(Rows(count, seed), batch_size=8, collate_fn=collated, **options)

    def train_dataloader(self) -> DataLoader:
        return self._loader(64, 0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(120, 1)

    def test_dataloader(self) -> DataLoader:
        return self._loader(160, 2)


class ByName(Network):
    def forward(self, numbers: Tensor, mask: Tensor) -> Tensor:
        return super().forward(numbers * mask)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*samples(64), strict=True)


class Streamed(Plain):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=8)


class Noisy(Dataset[Any]):
    """Augmented by a generator of its own, which nobody can seed: no view of a sample comes twice."""

    def __init__(self) -> None:
        self.x, self.y = samples(64)
        self.random = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + torch.randn(self.x.shape[1], generator=self.random), self.y[i]


class Unreplayable(Plain):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(), batch_size=8, shuffle=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command line's pipeline in this process, in an empty folder, on a data module of one's own."""
    monkeypatch.chdir(tmp_path)

    def verdict(data: type[LightningDataModule], *overrides: str, network: type = Network) -> Verdict | None:
        given = [*TINY, *overrides]
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = hydra.compose("config", given)
            for path, node in {
                "data": {"_target_": f"{__name__}.{data.__name__}"},
                "student.network": {"_target_": f"{__name__}.{network.__name__}", "width": 8},
                "teacher.network": {"_target_": f"{__name__}.{network.__name__}", "width": 16},
            }.items():
                OmegaConf.update(config, path, node, merge=False)
            return pipeline(config, overrides=given).run()

    return verdict


def result(folder: Path, name: str) -> dict[str, Any]:
    (file,) = folder.glob(f"mlruns/stages/{name}-????????????/result.json")
    return json.loads(file.read_text())["result"]


@pytest.mark.parametrize(("data", "network"), [(Plain, Network), (Mappings, ByName)])
@pytest.mark.parametrize("teachers", ["live", "stored"])
def test_it_is_distilled_from_a_live_teacher_and_from_stored_outputs(
    tmp_path: Path, run, data: type[LightningDataModule], network: type, teachers: str
) -> None:
    run(data, f"teachers={teachers}", "stages=[teacher,distilled]", network=network)
    teacher, student = (result(tmp_path, name) for name in ("teacher-hard_label-s0", "distilled-kd-T4-s0"))
    assert teacher["headline"] > 0.6
    assert student["headline"] > 0.6  # of four classes
    assert student["learned_nothing"] is None
    stored = list(tmp_path.glob("mlruns/stages/outputs-*"))
    assert len(stored) == (teachers == "stored")
    for folder in stored:
        manifest = verify(folder)
        assert (manifest.samples, manifest.views, manifest.complete) == (64, 1, True)


def test_what_is_stored_are_the_soft_targets_of_the_live_teacher(tmp_path: Path, run) -> None:
    """Over all samples, in whatever order."""
    one = ["trainer.max_steps=1", "stages=[teacher,distilled]", "losses=[kd]"]
    entropies = []
    for teachers in ("live", "stored"):
        run(Plain, f"teachers={teachers}", *one)
        newest = max(tmp_path.glob("mlruns/stages/distilled-*/result.json"), key=lambda file: file.stat().st_mtime_ns)
        entropies.append(json.loads(newest.read_text())["result"]["figures"]["teacher_entropy"])
    assert entropies[0] == pytest.approx(entropies[1], rel=2e-3)  # half precision


def test_mappings_go_to_the_verdict_and_into_files(tmp_path: Path, run) -> None:
    verdict = run(
        Mappings,
        "stages=[teacher,student,distilled,quantized,verdict]",
        "quantized.steps=4",
        "quantized.weights_only=null",
        network=ByName,
    )
    assert verdict.runtime == "ONNX Runtime"
    for model in verdict.models.values():
        assert model.figures["latency_ms_p50"] > 0
        assert model.value > 0.5
    (folder,) = tmp_path.glob("mlruns/stages/quantized-distilled-ptq-int8-s0-*")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [given.name for given in session.get_inputs()] == ["numbers", "mask"]
    x, y = samples(160, 2)
    (logits,) = session.run(None, {"numbers": x.numpy(), "mask": np.ones(x.shape, np.int64)})
    with np.load(folder / "predictions.npz") as arrays:
        assert np.array_equal(arrays["answers"], logits.argmax(1))
        assert np.array_equal(arrays["scores"], logits.argmax(1) == y.numpy())


def test_losses_that_remember_samples_get_their_numbers(tmp_path: Path, run) -> None:
    layers = ["losses.crd.student_layer=act", "losses.crd.teacher_layer=act", "losses.crd.negatives=16"]
    run(Plain, "stages=[teacher,distilled]", "losses=[kd,crd]", *layers)
    assert result(tmp_path, "distilled-kd-T4+crd-s0")["headline"] > 0.5


def test_its_stages_are_used_again_while_configuration_and_code_stay(tmp_path: Path, run, capsys) -> None:
    stages = ["stages=[teacher,distilled]", "teachers=stored"]
    run(Plain, *stages)
    capsys.readouterr()
    run(Plain, *stages)
    assert capsys.readouterr().out.count("reused") == 2
    run(Mappings, *stages, network=ByName)
    assert "reused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        (Streamed, ["teachers=stored"], r"^data: expected a training loader .* got an iterable data set, Stream: ret"),
        (
            Streamed,
            ["losses=[kd,crd]", "losses.crd.student_layer=act", "losses.crd.teacher_layer=act"],
            r"^data: expected a training loader .* got an iterable data set, Stream: ret",
        ),
        (
            Unreplayable,
            ["teachers=stored"],
            r"^data: sample 0 of Noisy is another each time that view 0 of it is asked for",
        ),
    ],
)
def test_what_cannot_be_stored_or_numbered_is_an_error_before_the_first_stage(
    tmp_path: Path, run, data: type[LightningDataModule], overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(data, "stages=[teacher,distilled]", *overrides)
    assert not list(tmp_path.glob("mlruns/stages/*/"))


def test_an_iterable_set_is_distilled_from_a_live_teacher(tmp_path: Path, run) -> None:
    run(Streamed, "stages=[teacher,distilled]")
    assert result(tmp_path, "distilled-kd-T4-s0")["headline"] > 0.5
