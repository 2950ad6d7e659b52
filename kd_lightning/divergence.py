"""Stop a training that has diverged, and say where it began."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from kd_lightning.objective import Term
from kd_lightning.outputs import AnyOutputs, Outputs, PeerOutputs, TopK
from kd_lightning.tasks import Batch
from kd_lightning.tracking.metrics import logs_this_step

_HOLD = "hold NaN or infinite values"
_DATA = "look for a broken sample, or a division by zero in the data set"
_TEACHER = "look at what the teacher gives for this batch: does it overflow, or do stored or given outputs hold NaN?"
_RATE = "lower the learning rate, or clip the gradients (gradient_clip_val)"


class Part(NamedTuple):
    """Something that a loss depends on, or one of its terms.

    Attributes:
        values: Tensors, in whatever they are nested.
        problem: What an error says of them where they are not finite: "the student's logits hold NaN …".
        remedy: What to do then.
        loss: Name of the term.
    """

    values: Any
    problem: str
    remedy: str
    loss: str = ""


class Divergence:
    """Raises FloatingPointError when a loss, or a student's weight, is not finite.

    A step whose gradients overflow in half precision is none of that: the scaler leaves it out, its loss is finite.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._found = False

    def watch(self, trainer: Trainer, total: Tensor, parts: Callable[[], Iterable[Part]]) -> None:
        """Look at the loss of a step.

        On a CPU at once. On another device, where looking waits for it, at the steps that are logged: NaN and infinity
        stay in the sum of the losses since.

        Args:
            trainer: Of the training.
            total: The loss.
            parts: All that it depends on, causes first.
        """
        loss, on_cpu = total.detach(), total.device.type == "cpu"
        if not on_cpu:
            self._sum = loss if self._sum is None else self._sum + loss
            if not logs_this_step(trainer):
                return
            loss, self._sum = self._sum, None
        if math.isfinite(loss.item()):
            return
        self._found = True
        step = trainer.global_step + 1
        since = step if on_cpu else max(step - trainer.log_every_n_steps + 1, 1)  # type: ignore[attr-defined]
        when = f"at step {step}" if since == step else f"between steps {since} and {step}"
        raise FloatingPointError(f"the training has diverged {when}: {describe(parts())}")

    def check_weights(self, student: nn.Module, peers: nn.ModuleDict) -> None:
        """Look at the weights, also of networks that are trained along, before they are saved or used."""
        if self._found:  # an exception is on its way, on which a checkpoint may be saved
            return
        of_peers = (not_finite(network, f"peer {name!r}", buffers=True) for name, network in peers.items())
        bad = not_finite(student, buffers=True) or next(filter(None, of_peers), None)
        if bad:
            self._found = True
            raise FloatingPointError(f"the training has diverged: {bad}, expected finite ones: {_RATE}")


def parts_of(
    batch: Batch,
    network: nn.Module,
    student: Outputs,
    teacher: AnyOutputs | None,
    terms: Mapping[str, Term],
    name: str = "student",
) -> Iterator[Part]:
    """Return what a distillation loss depends on, causes first."""
    yield Part((batch.args, dict(batch.kwargs)), f"the inputs {_HOLD}", _DATA)
    yield Part(batch.target, f"the targets {_HOLD}", _DATA)
    if teacher is not None:
        if isinstance(teacher, TopK):
            log_probs = teacher.log_probs.clamp_min(-1.0)  # −∞ fills up
            yield Part(log_probs, f"the teacher's log-probabilities {_HOLD}", _TEACHER)
        elif isinstance(teacher, PeerOutputs):
            yield from (Part(x.logits, f"the peer {n!r}'s logits {_HOLD}", _RATE) for n, x in teacher.networks.items())
        else:
            yield Part(teacher.logits, f"the teacher's logits {_HOLD}", _TEACHER)
        yield from (
            Part(x, f"the teacher's layer {layer!r} {_HOLD}", _TEACHER) for layer, x in teacher.features.items()
        )
    weights = not_finite(network, name)
    if weights is not None:
        yield Part(torch.tensor(math.nan), weights, f"{_RATE}; or is there NaN in the data?")
    yield Part(student.logits, f"the {name}'s logits {_HOLD}", _RATE)
    yield from (Part(x, f"the {name}'s layer {layer!r} {_HOLD}", _RATE) for layer, x in student.features.items())
    yield from (Part(t.raw, f"the loss {loss!r} is NaN or infinite", _RATE, loss) for loss, t in terms.items())


def describe(parts: Iterable[Part]) -> str:
    """Say which part is the first that is not finite, which losses are not, and what to do."""
    bad = [part for part in parts if _not_finite_in(part.values)]
    if not bad:
        return f"the loss is not finite, though all that it depends on is: {_RATE}"
    losses = ", ".join(repr(part.loss) for part in bad[1:] if part.loss)
    return f"{bad[0].problem}{f' (and the losses {losses})' if losses else ''}, expected finite ones: {bad[0].remedy}"


@torch.no_grad()
def not_finite(network: nn.Module, name: str = "student", buffers: bool = False) -> str | None:
    """Name the weights that are not finite, None where all are.

    Buffers, which a forward pass may have spoiled in this very step, are looked at where that is asked. They may be
    infinite, as masks are, but not NaN.
    """
    found = {weight: _ends(p).isfinite().all() for weight, p in network.named_parameters() if p.is_floating_point()}
    if buffers:
        found |= {weight: ~_ends(x).isnan().any() for weight, x in network.named_buffers() if x.is_floating_point()}
    if not found or bool(torch.stack([x.to(next(iter(found.values())).device) for x in found.values()]).all()):
        return None
    bad = [weight for weight, fine in found.items() if not fine]
    more = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
    return f"the {name}'s weights {bad[0]!r}{more} {_HOLD}"


def _ends(x: Tensor) -> Tensor:
    """Return the smallest and the largest value, NaN where one is: to look at each would take memory for them all."""
    plain = type(x.data) is Tensor and x.layout is torch.strided and x.element_size() > 1
    return torch.stack(x.detach().aminmax()) if plain and x.numel() else x


def _not_finite_in(values: Any) -> bool:
    found: list[Tensor] = []
    apply_to_collection(values, Tensor, found.append)
    return any(x.is_floating_point() and not bool(x.detach().isfinite().all()) for x in found)
