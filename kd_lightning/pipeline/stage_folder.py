"""What stays of a stage on disk, so that it can be gone on with and used again."""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from kd_lightning.checkpoint import load_student, load_weights
from kd_lightning.pipeline.files import write_atomically
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.pipeline.results import Result

LAST = "last.ckpt"
_WEIGHTS, _RESULT, _PREDICTIONS, _RUN_ID = "final.ckpt", "result.json", "predictions.npz", "run_id"
_FILE = "model.onnx"
_log = logging.getLogger(__name__)


class StageFolder:
    """What a stage keeps on disk; ``result.json`` is written last, so that a stage is finished or it is not."""

    def __init__(self, stages: Path, recipe: Recipe, fingerprint: str) -> None:
        self.path = stages / f"{recipe.name}-{fingerprint[:12]}"
        self.recipe, self.fingerprint = recipe, fingerprint

    @property
    def weights(self) -> Path:
        return self.path / _WEIGHTS

    @property
    def file(self) -> Path:
        """Of what is served: quantised, or in fp32 where that was asked for."""
        return self.path / _FILE

    @property
    def run_id(self) -> str | None:
        """Of the tracking run that this stage was logged to, if it was begun before."""
        file = self.path / _RUN_ID
        return file.read_text().strip() if file.is_file() else None

    def remember(self, run_id: str | None) -> None:
        """Make the folder, and note the tracking run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if run_id is not None:
            write_atomically(self.path / _RUN_ID, run_id.encode())

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint of an interrupted training, if there is one that can be read."""
        file = self.path / LAST
        if not file.is_file():
            return None
        try:
            load_student(file)
        except ValueError as error:
            _log.warning("%s; the training starts again", error)
            return None
        return file

    def finish(self, network: nn.Module, result: Result, losses: Mapping[str, Tensor] | None = None) -> None:
        weights, predictions = io.BytesIO(), io.BytesIO()
        torch.save({"state_dict": network.state_dict(), "losses": dict(losses or {})}, weights)
        write_atomically(self.weights, weights.getvalue())
        np.savez_compressed(predictions, predictions=result.predictions, target=result.target)
        write_atomically(self.path / _PREDICTIONS, predictions.getvalue())
        content = {"fingerprint": self.fingerprint, "result": result.to_dict()}
        write_atomically(self.path / _RESULT, json.dumps(content, indent=2).encode())
        (self.path / LAST).unlink(missing_ok=True)

    def read(self) -> Result | None:
        """Return the result of a finished stage, None where it is not finished, or its files are torn."""
        try:
            content = json.loads((self.path / _RESULT).read_text())
            if content["fingerprint"] != self.fingerprint:
                return None
            load_student(self.weights)
            with np.load(self.path / _PREDICTIONS, allow_pickle=False) as arrays:
                named = {"label": self.recipe.label, **{key: arrays[key] for key in ("predictions", "target")}}
                result = Result.from_dict(content["result"], **named)
            if result.quantized is not None and not self.file.is_file():
                return None
            return result
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            _log.warning("%s is damaged (%s); the stage runs again", self.path, error)
            return None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A stage that is done."""

    recipe: Recipe
    result: Result
    folder: StageFolder
    reused: bool
    architecture: Callable[[], nn.Module]
    """Makes the network as it was trained: the recipe's, but for a loss that changes the student's architecture."""

    def network(self) -> nn.Module:
        """Make the trained network anew, on the CPU."""
        network = self.architecture()
        load_weights(network, self.folder.weights)
        return network.eval()

    def losses(self) -> dict[str, Tensor]:
        """Return what its losses have learnt, such as projectors."""
        content = torch.load(self.folder.weights, map_location="cpu", weights_only=True)
        return dict(content["losses"])


def fingerprint_of(recipe: Recipe, data: LightningDataModule, teacher: Finished | None) -> str:
    """Hash all that decides a stage's outcome: its config, data, code, teacher, and the weights it starts from."""
    config, of_data = dict(recipe.config), getattr(data, "fingerprint", None)
    if of_data is not None:
        # It speaks of this role's images: the teacher's do not change with the number of the student's labels.
        config["data"] = [of_data(), getattr(data, "batch_size", None)]
    content = {
        "config": config,
        "code": _code_version(),
        "teacher": teacher.folder.fingerprint if teacher is not None and recipe.needs_teacher else None,
        "checkpoint": recipe.checkpoint and hashlib.sha256(recipe.checkpoint.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@cache
def _code_version() -> str:
    """Hash this package's sources, and name what it computes with."""
    digest = hashlib.sha256(f"torch {torch.__version__} lightning {lightning.__version__}".encode())
    package = Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()
