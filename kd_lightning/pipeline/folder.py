"""What stays of a stage on disk, whole or known not to be; who is at work on it.

A stage is one training, or quantisation, of one network with one seed, and the test of what came out.
"""

import io
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from kd_lightning.checkpoint import load_checkpoint, load_weights
from kd_lightning.durable_files import seal, sha256_of, unseal, write_atomically
from kd_lightning.pipeline.training import Answers, Training
from kd_lightning.records import Result, strict
from kd_lightning.tracking.runs import is_rank_zero

LAST = "last.ckpt"
_WEIGHTS, _PREDICTIONS, _FILE, _RESULT = "final.ckpt", "predictions.npz", "model.onnx", "result.json"
_EXAMPLE = "example.npz"
_LOCK, _OWNER = "lock", "owner"
_POLL_SECONDS = 0.2
_log = logging.getLogger(__name__)

Value = TypeVar("Value")


class StageFolder:
    """What a stage keeps on disk.

    ``result.json`` is written last, with the SHA-256 of the other files and of itself: a stage is finished and as it
    was written, or it runs again.
    """

    def __init__(self, stages: Path, training: Training, fingerprint: str) -> None:
        self.path = stages / f"{training.name}-{fingerprint[:12]}"
        self.training, self.fingerprint = training, fingerprint

    @property
    def weights(self) -> Path:
        return self.path / _WEIGHTS

    @property
    def file(self) -> Path:
        """Of what is served: quantised, or in fp32 where that was asked for."""
        return self.path / _FILE

    @property
    def example(self) -> Path:
        """The inputs of one sample, by the names that they have in an exported file; not there for other inputs."""
        return self.path / _EXAMPLE

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint of an interrupted training, if there is one that is whole, and of this stage."""
        file = self.path / LAST
        if not file.is_file():
            return None
        try:
            callbacks = load_checkpoint(file)["callbacks"]
            if callbacks[StageMark.__name__]["fingerprint"] != self.fingerprint:
                raise ValueError(f"{file} is of another stage")
        except (ValueError, KeyError, TypeError) as error:
            if is_rank_zero():
                known = isinstance(error, ValueError)
                _log.warning("%s; the training starts again", error if known else f"{file} is of another program")
            return None
        return file

    def finish(
        self,
        network: nn.Module,
        result: Result,
        losses: Mapping[str, Tensor] | None = None,
        validation: Tensor | None = None,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what stays.

        Args:
            network: As it was trained.
            result: Of its test, or of its file's.
            losses: What they have learnt.
            validation: Its answers on the validation split, where others are judged by them.
            example: Arrays that it takes, by name.
        """
        weights, packed = io.BytesIO(), io.BytesIO()
        arrays: dict[str, Any] = {"answers": result.answers, "scores": result.scores}
        torch.save({"state_dict": network.state_dict(), "losses": dict(losses or {})}, weights)
        write_atomically(self.weights, weights.getvalue())
        if validation is not None:
            arrays["validation"] = validation.numpy()
        np.savez_compressed(packed, **arrays)
        write_atomically(self.path / _PREDICTIONS, packed.getvalue())
        if example is not None:
            inputs = io.BytesIO()
            np.savez(inputs, **example)
            write_atomically(self.example, inputs.getvalue())
        files = [_WEIGHTS, _PREDICTIONS, *([_FILE] if result.quantized is not None else [])]
        self._write(strict({"headline": self._headline(result), **result.to_dict()}), files)
        (self.path / LAST).unlink(missing_ok=True)

    def result(self) -> Result | None:
        """Return the result of a finished stage; None where it is not finished.

        None as well where a file is missing or not as it was written, which a line names.
        """
        if not (self.path / _RESULT).is_file():
            return None
        try:
            content = self._recorded()
            for name, digest in content["files"].items():
                _check(self.path / name, digest)
            values = dict(content["result"])
            recorded = values.pop("headline")
            with np.load(self.path / _PREDICTIONS, allow_pickle=False) as arrays:
                named = {"label": self.training.label, **{key: arrays[key] for key in ("answers", "scores")}}
            result = Result.from_dict(values, **named)
            if strict({"headline": self._headline(result)})["headline"] != recorded:
                headline = self.training.task.headline
                raise ValueError(
                    f"{_PREDICTIONS} has {headline.name} {self._headline(result)} on the test {headline.units}, "
                    f"expected {recorded} as {_RESULT} says"
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

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the weights, ``weights``, and of the exported file, ``file``, where it is there."""
        recorded = self._recorded()["files"]
        names = {"weights": _WEIGHTS, "file": _FILE}
        return {key: recorded[name] for key, name in names.items() if name in recorded}

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

    def _headline(self, result: Result) -> float:
        return self.training.task.headline.value(result.scores)

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


class StageMark(Callback):
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
class FinishedStage:
    """A stage that is done."""

    training: Training
    result: Result
    folder: StageFolder
    reused: bool
    architecture: Callable[[], nn.Module]
    """Makes the network as it was trained: the training's, but for a loss that changes the student's architecture."""
    inputs: Callable[[], list[dict[str, Any]]] = list
    """Describes its data, see :func:`~kd_lightning.data.inputs.inputs_of`."""
    run_id: str | None = None
    """The key of the run to which this command logs it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What that run was told at its end, by name."""
    logged_at: int = 0
    """When, in milliseconds since 1970."""

    def network(self) -> nn.Module:
        """Make the trained network anew, on the CPU."""
        network = self.architecture()
        load_weights(network, self.folder.weights)
        return network.eval()

    def answers(self) -> Answers:
        """Return its answers on both splits, of a teacher by which others are judged."""
        with np.load(self.folder.path / _PREDICTIONS, allow_pickle=False) as arrays:
            return Answers(*(torch.from_numpy(arrays[name]) for name in ("validation", "answers")))

    def losses(self) -> dict[str, Tensor]:
        """Return what its losses have learnt, such as projectors."""
        return dict(load_checkpoint(self.folder.weights)["losses"])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file; :func:`~kd_lightning.durable_files.remove_leftovers` finds what a killed process leaves.

    Lightning writes to the system's temporary folder and then moves the file: a killed process leaves it there, and
    from another disk a move is a copy, which can be torn.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | PathLike[str], storage_options: Any = None
    ) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getvalue())


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder, as soon as no other process does; the system frees it from a process that ends, however it ends.

    The wait is said in a line that names the other process.

    Args:
        folder: Made where it is not there.
        what: The work in it, for that line: ``the stage teacher-hard_label-s0``.
    """
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("%s is under way in %s: waiting for that, to use what it gives", what, _owner(folder))
        lock.acquire(poll_interval=_POLL_SECONDS)
    with _named(folder, lock):
        yield


@contextmanager
def held_by_ranks(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for all processes of a distributed training: rank zero waits for others, and the ranks for it."""
    with held(folder, what) if is_rank_zero() else nullcontext():
        agreed(None)
        yield


def agreed(value: Value) -> Value:
    """Return rank zero's value on all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def held_if_free(folder: Path) -> Iterator[bool]:
    """Hold a folder unless another process does; tell whether it is held."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    with _named(folder, lock):
        yield True


def _lock(folder: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / _LOCK)


@contextmanager
def _named(folder: Path, lock: FileLock) -> Iterator[None]:
    try:
        write_atomically(folder / _OWNER, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):
            (folder / _OWNER).unlink()
        lock.release()


def _owner(folder: Path) -> str:
    try:
        return (folder / _OWNER).read_text(errors="replace")
    except OSError:
        return "another process"
