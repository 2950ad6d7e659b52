"""A teacher that a runtime for inference runs, in int8."""

import time
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.checkpoint import load_weights
from kd_lightning.dry_forward import dry_forward
from kd_lightning.export.batches import on_cpu
from kd_lightning.export.sessions import Session, open_session
from kd_lightning.outputs import Outputs, run
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.base import TeacherSource
from kd_lightning.teachers.fastest import differences
from kd_lightning.teachers.onnx_file import check_runtime, quantize, write


class RuntimeTeacher(TeacherSource):
    """A frozen network that ONNX Runtime or OpenVINO runs on the CPU, wherever the student trains.

    It answers its first batches with the network itself and keeps them: with them it is quantised, and logs what that
    changes of the probabilities. Each process does so with its own batches. Those of the first process are in the
    checkpoint, so that a resumed training has the same file.

    Args:
        network: Returns logits, or an object with ``.logits``; takes tensors. Frozen, for good, and in float32.
        checkpoint: As for :class:`~kd_lightning.teachers.Teacher`.
        runtime: ``"onnxruntime"`` (``pip install 'kd-lightning[onnx]'``) or ``"openvino"``
            (``'kd-lightning[openvino]'``).
        precision: ``"int8"``, static, weights by channel; or ``"float32"``. Since it runs on this machine alone,
            weights use all 8 bits where the processor adds their products exactly, and 7 where it may not.
        layers: Whose outputs it gives beside the logits.
        calibration_samples: That are kept.
        max_kl: In nats, at temperature 1, the mean of the samples that are kept.

    Raises:
        ImportError: Where a package is missing.
        ValueError: For an unknown runtime or precision, a number out of range, a checkpoint of another network, layers
            that it was not asked to give; and once it is quantised, for a divergence of more than ``max_kl``.
    """

    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        checkpoint: str | PathLike[str] | None = None,
        runtime: str = "onnxruntime",
        precision: str = "int8",
        layers: Iterable[str] = (),
        calibration_samples: int = 256,
        max_kl: float = 0.01,
    ) -> None:
        check_runtime(runtime)
        if precision not in ("int8", "float32"):
            raise ValueError(f"expected precision to be int8 or float32, got {precision!r}")
        if calibration_samples < 1:
            raise ValueError(f"expected calibration_samples of 1 or more, got {calibration_samples}")
        if not max_kl >= 0:
            raise ValueError(f"expected max_kl of 0 or more, got {max_kl}")
        self.network, self.runtime, self.precision, self.layers = network, runtime, precision, tuple(layers)
        self.calibration_samples, self.max_kl = calibration_samples, max_kl
        if checkpoint is not None:
            load_weights(network, checkpoint)
        network.eval().requires_grad_(False)
        self._session: Session | None = None
        self._kept: list[Batch] = []

    @torch.no_grad()
    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        layers, device = self._check(layers), self._device(batch)
        batch = on_cpu(batch, "a teacher through a runtime")
        if self._session is None and sum(map(_size, self._kept)) >= self.calibration_samples:
            self._session = self._open()
        if self._session is None:
            self._kept.append(batch)
            outputs = self._float(batch)
        else:
            outputs = self._named(self._session(batch))
        return Outputs(outputs.logits.to(device), {name: outputs.features[name].to(device) for name in layers})

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        return dry_forward("teacher", self.network, batch.args, batch.kwargs, self._check(layers))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Stay on the CPU, in float32."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the batches of the calibration, as far as it has come."""
        return {f"{i}.{name}": x for i, batch in enumerate(self._kept) for name, x in _tensors(batch).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        batches: dict[str, dict[str, Tensor]] = {}
        for key, x in state.items():
            number, _, name = key.partition(".")
            batches.setdefault(number, {})[name] = x
        self._kept, self._session = [_batch(tensors) for tensors in batches.values()], None

    def _open(self) -> Session:
        """Make the file and load it; say what it changes."""
        with TemporaryDirectory() as folder:
            path, int8 = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
            write(self.network, self._kept[0], self.layers, path)
            if self.precision == "int8":
                quantize(path, int8, self._kept)
                path = int8
            session = open_session(path, self.runtime)
        found = [differences(self._float(batch), self._named(session(batch))) for batch in self._kept]
        samples = sum(map(_size, self._kept))
        kl = sum(kl * _size(batch) for (kl, _), batch in zip(found, self._kept, strict=True)) / samples
        if kl > self.max_kl:
            raise ValueError(
                f"the teacher in {self.precision} through {self.runtime} diverges from the network by a KL of {kl:.1e} "
                f"nats on {samples} samples, expected {self.max_kl:g} at most: raise calibration_samples or max_kl, or "
                "set precision='float32'"
            )
        batch = self._kept[-1]
        rank_zero_info(
            f"teacher: {self.precision} through {self.runtime}, KL {kl:.1e} nats at temperature 1 from the network on "
            f"the {samples} samples of its calibration; {_ms(lambda: session(batch))} instead of "
            f"{_ms(lambda: self._float(batch))} for a batch of {_size(batch)}"
        )
        return session

    def _float(self, batch: Batch) -> Outputs:
        with torch.autocast("cpu", enabled=False):
            return run(self.network.eval(), batch.args, batch.kwargs, self.layers)

    def _named(self, tensors: list[Tensor]) -> Outputs:
        return Outputs(tensors[0], dict(zip(self.layers, tensors[1:], strict=True)))

    def _device(self, batch: Batch) -> torch.device:
        tensors = (x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor))
        return next((x.device for x in tensors), torch.device("cpu"))

    def _check(self, layers: Iterable[str]) -> tuple[str, ...]:
        layers = tuple(layers)
        missing = [name for name in layers if name not in self.layers]
        if missing:
            raise ValueError(
                f"the losses read the teacher's layers {list(layers)}, the file is to give {list(self.layers)}: pass "
                f"RuntimeTeacher(layers={[*self.layers, *missing]}), or take a Teacher"
            )
        return layers


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """Return a batch's arguments by their positions and names."""
    return {**{str(i): x for i, x in enumerate(batch.args)}, **batch.kwargs}


def _batch(tensors: Mapping[str, Tensor]) -> Batch:
    args = tuple(x for name, x in tensors.items() if name.isdecimal())
    return Batch(args, {name: x for name, x in tensors.items() if not name.isdecimal()}, None)


def _size(batch: Batch) -> int:
    return len(next(x for x in (*batch.args, *batch.kwargs.values())))


def _ms(function: Callable[[], object]) -> str:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return f"{1e3 * min(times):.3g} ms"
