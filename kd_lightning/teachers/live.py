"""A teacher that runs beside the student."""

from collections.abc import Iterable
from os import PathLike

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kd_lightning.checkpoint import load_weights
from kd_lightning.dry_forward import dry_forward
from kd_lightning.outputs import Outputs
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.accelerate import Way, check_precision, device_of, parse, run_in, set_memory_format
from kd_lightning.teachers.base import TeacherSource
from kd_lightning.teachers.fastest import fastest


class Teacher(TeacherSource):
    """A frozen network, in eval mode, that gives outputs and is otherwise nobody's child.

    Args:
        network: Returns logits, or an object with ``.logits``. Its parameters are frozen, for good.
        checkpoint: Weights to load: a state dict, or a Lightning checkpoint that holds the network under any prefix.
        accelerate: How to run it faster, its results within rounding: some of ``channels_last`` (convolutions),
            ``bfloat16``, ``float16`` (autocast, where the device has instructions for it) and ``compile``. Or
            ``"auto"``: times the first three and their combinations on the first batch, logs what it picks, and picks
            none that changes the probabilities by a KL divergence of more than 1e-4 nats, or logits and tapped layers
            by more than 2 % (root mean square). The next run may pick another: name the options where runs have to be
            bitwise the same.

    Raises:
        ValueError: When the checkpoint does not fit the network, or for an unknown option; in ``to`` for a precision
            that the device would only emulate.
    """

    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        checkpoint: str | PathLike[str] | None = None,
        accelerate: str | Iterable[str] = (),
    ) -> None:
        unready = next((name for name, p in network.named_parameters() if p.is_meta or is_lazy(p)), None)
        if unready is not None and checkpoint is None:
            raise ValueError(
                f"the teacher's parameter {unready!r} has no values, on the meta device or of a lazy module, expected "
                "a network that is ready: load its weights, and call a lazy one once"
            )
        self.network = network
        options = (accelerate,) if isinstance(accelerate, str) else tuple(accelerate)
        self._way = None if options == ("auto",) else parse(options)
        self._picked: dict[object, Way] = {}
        self._channels_last = False
        if checkpoint is not None:
            load_weights(network, checkpoint)
        network.eval().requires_grad_(False)
        if "compile" in options:
            network.compile()

    @torch.no_grad()  # not inference_mode: losses save features for their backward pass
    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        self.network.eval()
        layers = tuple(layers)
        way = self._pick(batch, layers) if self._way is None else self._way
        if way.channels_last != self._channels_last:
            set_memory_format(self.network, way.channels_last)
            self._channels_last = way.channels_last
        return run_in(way, self.network, batch, layers)

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        return dry_forward("teacher", self.network, batch.args, batch.kwargs, layers)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        if self._way is not None and self._way.dtype is not None:
            check_precision(device, self._way.dtype)
        self.network.to(device, dtype)

    def _pick(self, batch: Batch, layers: tuple[str, ...]) -> Way:
        device = device_of(self.network, batch)
        dtypes = frozenset(weight.dtype for weight in self.network.parameters())
        situation = (layers, device, dtypes, torch.is_autocast_enabled(device.type))
        if situation not in self._picked:
            if self._channels_last:
                set_memory_format(self.network, channels_last=False)
                self._channels_last = False
            self._picked[situation] = fastest(self.network, batch, layers)
        return self._picked[situation]
