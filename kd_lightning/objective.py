"""The one place where a distillation loss is computed, whichever front door it came through."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kd_lightning.losses.base import DistillationLoss
from kd_lightning.losses.gather import all_gather, gather_outputs, world_size
from kd_lightning.outputs import TOP_K_REMEDY, AnyOutputs, Outputs, PeerOutputs, TopK


class Term(NamedTuple):
    """One loss's share of the objective, both as scalars."""

    raw: Tensor
    weighted: Tensor


class DistillationObjective(nn.Module):
    """The weighted sum of named losses.

    Losses run in float32 under autocast, and on half-precision outputs.

    Args:
        losses: By the name under which each is logged and found in configs.
        peers: Networks that are trained along with the student, by name; see :class:`~kd_lightning.teachers.Peers`.

    Raises:
        ValueError: For no loss at all, or a name that no module can have; with peers, for losses that read more than
            predictions, or none that compares.
        TypeError: For something that is no mapping, or no :class:`DistillationLoss` in it.
    """

    losses: nn.ModuleDict

    def __init__(self, losses: Mapping[str, DistillationLoss], peers: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        if not isinstance(losses, Mapping):
            raise TypeError(f"expected losses by name, got a {type(losses).__name__}: pass {{'kd': KD(), ...}}")
        if not losses:
            raise ValueError("expected at least one loss, got none: pass for instance losses={'kd': KD()}")
        for name, loss in losses.items():
            if not isinstance(loss, DistillationLoss):
                raise TypeError(f"loss {name!r} is {_no_loss(loss)}")
            layers = [layer for layer in (*loss.student_layers, *loss.teacher_layers) if not isinstance(layer, str)]
            if layers:
                raise TypeError(
                    f"loss {name!r} has the layer {layers[0]!r}, expected a name: pass one of named_modules()"
                )
            if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"expected a loss's name to be a word without dots, got {name!r}: rename it")
        self.losses = nn.ModuleDict(losses)
        self.peers, self.losses_of_peers = nn.ModuleDict(peers or {}), nn.ModuleDict()
        if peers:
            self._check_mutual()
        self._built = False
        self._attached: tuple[nn.Module, ...] = ()  # a tuple: the student is no submodule

    def named_losses(self) -> dict[str, DistillationLoss]:
        return {name: loss for name, loss in self.losses.items() if isinstance(loss, DistillationLoss)}

    @property
    def student_layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for loss in self.named_losses().values() for name in loss.student_layers))

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for loss in self.named_losses().values() for name in loss.teacher_layers))

    @property
    def needs_teacher(self) -> bool:
        return any(loss.needs_teacher for loss in self.named_losses().values())

    @property
    def reads_logits(self) -> bool:
        return any(loss.reads_logits for loss in self.named_losses().values())

    @property
    def names_heads(self) -> bool:
        """Whether a loss computes logits itself, so that outputs are logits, though it does not read them."""
        return any(loss.student_head is not None for loss in self.named_losses().values())

    @property
    def idle_student_heads(self) -> tuple[str, ...]:
        """The student's heads of which nobody reads the logits in a training step."""
        heads = [loss.student_head for loss in self.named_losses().values()]
        return () if self.reads_logits else _others(heads, self.student_layers)

    @property
    def idle_teacher_heads(self) -> tuple[str, ...]:
        """The same of the teacher."""
        losses = self.named_losses().values()
        read = any(loss.reads_logits and loss.needs_teacher for loss in losses)
        return () if read else _others([loss.teacher_head for loss in losses], self.teacher_layers)

    @property
    def changing_losses(self) -> dict[str, DistillationLoss]:
        """The losses that change the student's architecture, before it is trained."""
        return {name: loss for name, loss in self.named_losses().items() if loss.changes_student}

    def check_takes_top_k(self, got: str) -> None:
        """Raise ValueError for losses that read the teacher's logits of all classes, where its best are all there is.

        Args:
            got: In their place, in words.
        """
        refused = [name for name, loss in self.named_losses().items() if loss.needs_teacher and not loss.takes_top_k]
        if refused:
            raise ValueError(f"losses {refused} read the teacher's logits of all classes, got {got}: {TOP_K_REMEDY}")

    def _check_mutual(self) -> None:
        losses, changing = self.named_losses(), self.changing_losses
        looking = [
            name
            for name, loss in losses.items()
            if loss.student_layers or loss.teacher_layers or loss.needs_teacher_network or name in changing
        ]
        if looking:
            raise ValueError(
                f"losses {looking} read layers or look into a network, expected losses on logits: peers learn from "
                "each other's predictions; leave them out"
            )
        if not self.needs_teacher:
            raise ValueError(
                f"losses {list(losses)} compare nothing with a peer, expected one that does, such as 'kd': KD()"
            )

    def temperatures(self) -> dict[str, float]:
        """Return the current temperature of each loss that has one."""
        found = {name: getattr(loss, "temperature", None) for name, loss in self.named_losses().items()}
        return {name: float(value) for name, value in found.items() if value is not None}

    def build(
        self,
        student: Outputs,
        teacher: AnyOutputs | None,
        student_network: nn.Module | None = None,
        teacher_network: nn.Module | None = None,
    ) -> None:
        """Create the losses' parameters from the outputs of a dry forward pass; once, a second fit trains them on."""
        if not self._built:
            known: Any = None if teacher is None else teacher.softened(1.0)  # a TopK to losses that take one
            for name, loss in self.named_losses().items():
                with errors_name(name, loss):
                    loss.build(student, known)
            for peer in self.peers:
                self.losses_of_peers[peer] = copy.deepcopy(self.losses)
            self._built = True
        if student_network is not None:
            self.attach(student_network, teacher_network)

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Show the losses the networks; again only when the student is another object than the last time."""
        if self._attached and self._attached[0] is student:
            return
        for name, loss in self.named_losses().items():
            with errors_name(name, loss):
                loss.attach(student, teacher)
        self._attached = (student,)

    def forward(
        self, student: Outputs, teacher: AnyOutputs | None, target: Tensor | None
    ) -> tuple[Tensor, dict[str, Term]]:
        """Return the total, and each term by name; those of a peer by ``<loss>/<peer>``."""
        device = student.logits.device.type
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            student = student.in_full_precision()
            # A loss that needs no teacher does not look at it.
            teacher = teacher.in_full_precision() if teacher is not None else student
            if isinstance(teacher, PeerOutputs):
                terms = self._mutual(student, teacher, target)
            else:
                terms = {
                    name: _term(name, loss, student, [teacher], target, autocast) for name, loss in self._losses_of()
                }
            total: Tensor = torch.stack([term.weighted for term in terms.values()]).sum()
            return total, terms

    def _mutual(self, student: Outputs, peers: PeerOutputs, target: Tensor | None) -> dict[str, Term]:
        """Compute the losses of the student and of each peer, each against the predictions of all others."""
        every = {"": student, **{name: one._replace(samples=student.samples) for name, one in peers.networks.items()}}
        terms = {}
        for peer, learner in every.items():
            others = [Outputs(one.logits.detach()) for name, one in every.items() if name != peer]
            for name, loss in self._losses_of(peer):
                terms[f"{name}/{peer}" if peer else name] = _term(name, loss, learner, others, target)
        return terms

    def _losses_of(self, peer: str = "") -> Iterable[tuple[str, DistillationLoss]]:
        """Return the student's losses by name, or a peer's, with the numbers that the student's have now."""
        if not peer:
            return self.named_losses().items()
        own = cast("nn.ModuleDict", self.losses_of_peers[peer])
        for copied, original in zip(own.modules(), self.losses.modules(), strict=True):
            vars(copied).update({name: x for name, x in vars(original).items() if type(x) in (int, float)})
        return [(name, loss) for name, loss in own.items() if isinstance(loss, DistillationLoss)]


def _no_loss(loss: object) -> str:
    if isinstance(loss, type) and issubclass(loss, DistillationLoss):
        return f"the class {loss.__name__}, expected a DistillationLoss: call it, {loss.__name__}()"
    return f"a {type(loss).__name__}, expected a DistillationLoss: subclass it"


def _term(
    name: str,
    loss: DistillationLoss,
    student: Outputs,
    teachers: Sequence[AnyOutputs],
    target: Tensor | None,
    autocast: bool = False,
) -> Term:
    """Compute one loss: the mean over several teachers."""
    device = student.logits.device.type
    with errors_name(name, loss), torch.autocast(device, enabled=autocast and loss.products_in_autocast):
        temperature = getattr(loss, "temperature", None)
        against = teachers if loss.needs_teacher else teachers[:1]
        raw = [loss(*_batch_of(loss, student, one.softened(temperature), target)) for one in against]
        for value in raw:
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(f"expected forward to return one number, a tensor (), got {got}: take its mean")
        mean = raw[0] if len(raw) == 1 else torch.stack(raw).mean()
        return Term(mean, loss.weight * mean)


@contextmanager
def errors_name(name: str, loss: DistillationLoss) -> Iterator[None]:
    """Say in an error which loss it is about, and which layers that reads."""
    try:
        yield
    except ValueError as error:
        layers = [
            f"{side} {', '.join(map(repr, names))}"
            for side, names in (("student", loss.student_layers), ("teacher", loss.teacher_layers))
            if names
        ]
        where = f" ({'; '.join(layers)})" if layers else ""
        raise ValueError(f"loss {name!r}{where}: {error}") from error


def _batch_of(
    loss: DistillationLoss, student: Outputs, teacher: Outputs | TopK, target: Tensor | None
) -> tuple[Outputs, Outputs | TopK, Tensor | None]:
    """Return what a loss is computed on: this process's samples, or those of all."""
    if not loss.gather or world_size() == 1:
        return student, teacher, target
    return (
        gather_outputs(student, loss.student_layers),
        gather_outputs(teacher, loss.teacher_layers),
        None if target is None else all_gather(target),
    )


def _others(heads: Iterable[str | None], read: Sequence[str]) -> tuple[str, ...]:
    """Return the heads, each once, without those whose output a loss reads as a layer's."""
    return tuple(dict.fromkeys(head for head in heads if head is not None and head not in read))


def find_objective(module: nn.Module) -> DistillationObjective | None:
    """Return the objective that a LightningModule carries, through whichever front door it came."""
    return next((child for child in module.children() if isinstance(child, DistillationObjective)), None)
