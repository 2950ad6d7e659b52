from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import kd_lightning.data
from kd_lightning.data.image_data import ImageData

FOLDER = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.yaml")))
def test_each_config_makes_what_the_pipeline_asks_for(name: str, tmp_path: Path):
    config: Any = OmegaConf.load(FOLDER / f"{name}.yaml")
    if name == "image_folder":
        pytest.importorskip("torchvision", reason="torchvision is missing: ImageFolder cannot be made")
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                (tmp_path / split / label).mkdir(parents=True)
        config.folder = str(tmp_path)
    if name == "text_files":
        (tmp_path / "text.txt").write_text("To be, or not to be.")
        config.files = [str(tmp_path / "text.txt")]
    for role in ("teacher", "student", "control", "distilled"):
        data = instantiate(config, role=role, seed=3, _convert_="all")
        assert (data.role, data.seed) == (role, 3)
        if isinstance(data, ImageData):
            assert len(data.input_shape) == 3
            assert len(data.mean) == len(data.std) == data.input_shape[0]
    assert not {"role", "seed"} & set(config)  # the pipeline says which


def test_each_data_module_has_a_config():
    targets = {OmegaConf.load(file)._target_ for file in FOLDER.glob("*.yaml")}
    assert targets == {
        f"kd_lightning.data.{name}" for name in kd_lightning.data.__all__ if name not in ("TextData", "WithIds")
    }
