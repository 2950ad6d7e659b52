"""What stays of a stage on disk, so that it can be gone on with and used again."""

import io
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from kd_lightning.checkpoint import load_checkpoint, load_weights
from kd_lightning.durable_files import seal, sha256_of, unseal, write_atomically
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.pipeline.results import Result
from kd_lightning.pipeline.run_id import read_run_id, write_run_id
from kd_lightning.tracking.runs import is_rank_zero

LAST = "last.ckpt"
_WEIGHTS, _PREDICTIONS, _FILE, _RESULT = "final.ckpt", "predictions.npz", "model.onnx", "result.json"
_log = logging.getLogger(__name__)


class StageFolder:
    """What a stage keeps on disk.

    ``result.json`` is written last, with the SHA-256 of the other files and of itself: a stage is finished and as it
    was written, or it runs again.
    """

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
        return read_run_id(self.path, self.fingerprint)

    def remember(self, run_id: str | None) -> None:
        """Note the tracking run."""
        if run_id is not None:
            write_run_id(self.path, run_id, self.fingerprint)

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint of an interrupted training, if there is one that is whole, and of this stage."""
        file = self.path / LAST
        if not file.is_file():
            return None
        try:
            callbacks = load_checkpoint(file)["callbacks"]
            if callbacks[OfStage.__name__]["fingerprint"] != self.fingerprint:
                raise ValueError(f"{file} is of another stage")
        except (ValueError, KeyError, TypeError) as error:
            if is_rank_zero():
                known = isinstance(error, ValueError)
                _log.warning("%s; the training starts again", error if known else f"{file} is of another program")
            return None
        return file

    def finish(self, network: nn.Module, result: Result, losses: Mapping[str, Tensor] | None = None) -> None:
        weights, predictions = io.BytesIO(), io.BytesIO()
        torch.save({"state_dict": network.state_dict(), "losses": dict(losses or {})}, weights)
        write_atomically(self.weights, weights.getvalue())
        np.savez_compressed(predictions, predictions=result.predictions, target=result.target)
        write_atomically(self.path / _PREDICTIONS, predictions.getvalue())
        self._write(result.to_dict(), [_WEIGHTS, _PREDICTIONS, *([_FILE] if result.quantized is not None else [])])
        (self.path / LAST).unlink(missing_ok=True)

    def read(self) -> Result | None:
        """Return the result of a finished stage; None where it is not finished.

        None as well where a file is missing or not as it was written, which a line names.
        """
        if not (self.path / _RESULT).is_file():
            return None
        try:
            content = self._recorded()
            for name, digest in content["files"].items():
                _check(self.path / name, digest)
            with np.load(self.path / _PREDICTIONS, allow_pickle=False) as arrays:
                named = {"label": self.recipe.label, **{key: arrays[key] for key in ("predictions", "target")}}
            result = Result.from_dict(content["result"], **named)
            if result.accuracy != content["result"]["accuracy"]:
                raise ValueError(
                    f"{_PREDICTIONS} has {result.accuracy} of the test images right, expected "
                    f"{content['result']['accuracy']} as {_RESULT} says"
                )
        except (ValueError, OSError) as error:
            if is_rank_zero():
                _log.warning("%s is damaged: %s; the stage runs again", self.path, error)
            return None
        if is_rank_zero():
            (self.path / LAST).unlink(missing_ok=True)  # of a process that was killed between the two
        return result

    def identity(self) -> str:
        """Return what a stage that begins with these weights, or learns from them, depends on.

        The fingerprint says how they were made; on some devices that gives other weights each time.
        """
        return f"{self.fingerprint} {self._recorded()['files'][_WEIGHTS]}"

    def has_file(self) -> bool:
        """Tell whether the exported file is there, as it was written; a line names one that is not."""
        try:
            digest = self._recorded()["files"].get(_FILE)
            if digest is None:  # also where the process was killed before it was recorded
                return False
            _check(self.file, digest)
        except (ValueError, OSError) as error:
            _log.warning("%s is damaged: %s; it is written again", self.file, error)
            return False
        return True

    def record_file(self) -> None:
        """Add the exported file, once it is written, to those that ``result.json`` vouches for."""
        content = self._recorded()
        self._write(content["result"], {*content["files"], _FILE})

    def _recorded(self) -> dict[str, Any]:
        try:
            content = unseal((self.path / _RESULT).read_bytes())
        except ValueError as error:
            raise ValueError(f"{_RESULT}: {error}") from error
        if content["fingerprint"] != self.fingerprint:
            raise ValueError(f"{_RESULT} is of another stage")
        return content

    def _write(self, result: Mapping[str, Any], files: Iterable[str]) -> None:
        digests = {name: sha256_of(self.path / name) for name in sorted(files)}
        content = {"fingerprint": self.fingerprint, "files": digests, "result": result}
        write_atomically(self.path / _RESULT, seal(content).encode())


class OfStage(Callback):
    """Writes into the checkpoints of a training of which stage they are."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}


def _check(path: Path, digest: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if sha256_of(path) != digest:
        raise ValueError(f"{path.name} has other bytes than were written, by its SHA-256")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A stage that is done."""

    recipe: Recipe
    result: Result
    folder: StageFolder
    reused: bool
    architecture: Callable[[], nn.Module]
    """Makes the network as it was trained: the recipe's, but for a loss that changes the student's architecture."""
    run_id: str | None = None
    """The tracking run to which this command logs it."""

    def network(self) -> nn.Module:
        """Make the trained network anew, on the CPU."""
        network = self.architecture()
        load_weights(network, self.folder.weights)
        return network.eval()

    def losses(self) -> dict[str, Tensor]:
        """Return what its losses have learnt, such as projectors."""
        return dict(load_checkpoint(self.folder.weights)["losses"])
