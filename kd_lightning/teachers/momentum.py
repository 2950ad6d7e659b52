"""A teacher that is the student's own past."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_lightning.checkpoint import mismatch
from kd_lightning.dry_forward import dry_forward
from kd_lightning.losses.gather import world_size
from kd_lightning.objective import DistillationObjective
from kd_lightning.outputs import Outputs, run
from kd_lightning.schedules import Schedule
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.base import TeacherSource

_HALF = (torch.float16, torch.bfloat16)


class Momentum(TeacherSource):
    """A moving average of the student's weights: Mean teachers (Tarvainen & Valpola, NeurIPS 2017).

    https://arxiv.org/abs/1703.01780. It starts as the student, and after each optimizer step every weight becomes
    d·average + (1 − d)·student. Statistics of batch normalisation are averaged likewise, as they belong to the averaged
    weights; integers and buffers that are in no state dict are the student's. It runs in eval mode, on the view that
    the student gets. Weights in half precision are averaged in float32, in which alone a decay near 1 moves them.

    The average is in the checkpoint, under ``teacher``, and a second ``fit`` of the same student goes on with it. Under
    DDP all processes have the same one. The student is whole in each process: no FSDP.

    Args:
        decay: d in [0, 1], or a schedule of it (:mod:`kd_lightning.schedules`). The average is over some 1/(1 − d)
            steps.

    Attributes:
        network: The averaged student, once training has begun.

    Raises:
        ValueError: For a decay outside [0, 1], at any time.

    Example:
        >>> from kd_lightning.schedules import cosine
        >>> teacher = Momentum(decay=cosine(0.99, 1.0))
    """

    learns = True
    copies_student = True

    def __init__(self, decay: float | Schedule = 0.999) -> None:
        self.decay = decay
        self.scheduled = callable(decay)
        for share in range(101):
            _check_decay(decay(share / 100) if callable(decay) else decay)
        self._student: nn.Module | None = None
        self._started = False
        self._wide: dict[str, Tensor] = {}  # in float32, what the network has in half precision

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        network = self._prepared()
        network.eval()
        with torch.no_grad():
            return run(network, batch.args, batch.kwargs, layers)

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        return dry_forward("teacher", self._prepared(), batch.args, batch.kwargs, layers)

    def can_teach(self, batch: Batch) -> bool:
        return self.network is not None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        network = self.network
        if network is None:
            return  # there is nothing to validate with before a training
        tensors = _averaged(network)
        if all(x.device == device and x.dtype == (dtype or x.dtype) for x in tensors.values()):
            return
        wide = {name: self._wide.get(name, x).to(device, copy=True) for name, x in tensors.items()}
        network.to(device, dtype)
        self._widen(wide)

    def prepare(self, student: nn.Module) -> None:
        if self._student is student:
            return
        network = copy.deepcopy(student)
        for name, child in list(network.named_children()):
            if isinstance(child, DistillationObjective):  # hung on a module that is the student itself
                delattr(network, name)
        self.network = network.eval().requires_grad_(False)
        self._student, self._started = student, False
        self._widen(_averaged(network))

    def start(self, student: nn.Module) -> None:
        self.prepare(student)
        if not self._started:
            self._move(student, decay=0.0)  # DDP, or a checkpoint, may have set its weights since
            self._started = True

    def after_step(self, student: nn.Module, progress: float) -> None:
        self._move(student, self.decay(progress) if callable(self.decay) else self.decay)

    @torch.no_grad()
    def _move(self, student: nn.Module, decay: float) -> None:
        _check_decay(decay)
        network = self._prepared()
        now = {**dict(student.named_parameters()), **_buffers(student)}
        averaged = _averaged(network)
        for name, x in {**dict(network.named_parameters()), **dict(network.named_buffers())}.items():
            if name not in now or now[name].shape != x.shape:
                raise ValueError(
                    f"the student's {name!r} is not what it was when its average began, expected the same architecture "
                    "in each process: change the student before training, and take a strategy that keeps it whole (DDP)"
                )
            if name not in averaged:
                x.copy_(now[name])
                continue
            average = self._wide.get(name, x)
            average.lerp_(now[name].to(average), 1 - decay)
            if average is not x:
                x.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, as a state dict of the student's names; half-precision weights as float32."""
        return {} if self.network is None else {**self.network.state_dict(), **self._wide}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with an average.

        Raises:
            ValueError: When there is none, or it is another network's.
        """
        network = self._prepared()
        problem = mismatch(network, state) if state else "it holds none"
        if problem:
            raise ValueError(
                f"the checkpoint's moving average does not fit Momentum: {problem}; resume with the teacher of the "
                "training that wrote it, or load the student's weights before fit"
            )
        network.load_state_dict(state)
        self._widen(state)
        self._started = True

    @torch.no_grad()
    def _widen(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the average from tensors by name: into float32 where the network is in half precision."""
        self._wide = {}
        for name, x in _averaged(self._prepared()).items():
            if x.dtype in _HALF:
                self._wide[name] = tensors[name].to(x.device, torch.float32, copy=True)
            else:
                x.copy_(tensors[name])

    def _prepared(self) -> nn.Module:
        if self.network is None:
            raise RuntimeError("Momentum has no student yet, expected a training to have begun: call prepare(student)")
        return self.network


def _averaged(network: nn.Module) -> dict[str, Tensor]:
    """Return floating-point parameters, each once, and buffers that a state dict holds."""
    tensors: dict[str, Any] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    saved = network.state_dict().keys()
    return {name: x for name, x in tensors.items() if name in saved and x.is_floating_point()}


def _buffers(student: nn.Module) -> dict[str, Tensor]:
    """Return the student's buffers: under DDP the first process's, which the next forward pass gives to all."""
    buffers = dict(student.named_buffers())
    if world_size() == 1 or not buffers:
        return buffers
    for dtype in dict.fromkeys(x.dtype for x in buffers.values()):
        names = [name for name, x in buffers.items() if x.dtype == dtype]
        flat = torch.cat([buffers[name].flatten() for name in names])
        dist.broadcast(flat, 0)
        parts = torch.split(flat, [buffers[name].numel() for name in names])
        buffers |= {name: part.view_as(buffers[name]) for name, part in zip(names, parts, strict=True)}
    return buffers


def _check_decay(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"expected a decay in [0, 1], got {decay}: 0.999 averages over some 1,000 steps")
