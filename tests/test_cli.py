"""What the command line answers."""

from pathlib import Path

import pytest

from kd_lightning.cli import conf_dir
from tests.command import TINY, copied, kd_lightning
from tests.pipeline.test_pipeline import runs

LOSSES = ", ".join(sorted(file.stem for file in (conf_dir() / "losses").glob("*.yaml")))
OWN_LOSS = """
from kd_lightning.losses import DistillationLoss


class LogitsMSE(DistillationLoss):
    def forward(self, student, teacher, target):
        return (student.logits - teacher.logits).square().mean()
"""
OWN_YAML = """
logits_mse:
  _target_: my_losses.LogitsMSE
  weight: 0.5
"""


def test_help_names_the_groups_and_writes_nothing(tmp_path: Path) -> None:
    printed = kd_lightning("--help", cwd=tmp_path)
    for word in ("kd-lightning losses.kd.temperature=2", f"losses: {LOSSES}", "seeds:"):
        assert word in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("losses.kd.temprature=3", "the nearest names are losses.kd.temperature"),
        ("losses=[hard_label,kdd]", f"losses: the options here are {LOSSES}"),
        ("modles@student.network=cnn8", "models"),
        ("models@student.network=cnn9", "models: the options here are cnn64, cnn8, mlp32"),
        ("experiment=fashion_mnist/foo", "fashion_mnist/temperature"),
    ],
)
def test_a_typo_is_answered_with_what_is_there(tmp_path: Path, argument: str, answer: str) -> None:
    assert answer in kd_lightning(argument, cwd=tmp_path, code=1)
    assert not list(tmp_path.iterdir())


def test_a_loss_of_ones_own_is_one_file_and_one_yaml(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    (folder / "my_losses.py").write_text(OWN_LOSS)
    (folder / "my_conf" / "losses").mkdir(parents=True)
    (folder / "my_conf" / "losses" / "logits_mse.yaml").write_text(OWN_YAML)
    own = ["hydra.searchpath=[file://my_conf]", "losses=[hard_label,logits_mse]"]
    printed = kd_lightning(*own, *TINY, "stages=[teacher,distilled]", cwd=folder, PYTHONPATH=str(folder))
    assert "distilled-logits_mse-s0" in printed
    _, _, children = runs(folder)
    values = children[-1].data.metrics
    assert values["train/loss_weighted/logits_mse"] == pytest.approx(0.5 * values["train/loss/logits_mse"])
