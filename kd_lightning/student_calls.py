"""Watch a network that somebody else calls."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.logits_place import LogitsPlace
from kd_lightning.outputs import capture, find_layer


@dataclass
class Seen:
    """What went in and out of the student while it was watched."""

    inputs: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    features: Mapping[str, Tensor] = field(default_factory=dict)
    read: Callable[[Any], Tensor] | None = None
    """Takes the logits out of one of :attr:`outputs`."""
    problem: str = ""
    """What is missing, and the remedy; empty where nothing is."""

    @property
    def logits(self) -> Tensor:
        """Those of the first forward pass.

        Raises:
            ValueError: When they are not in what the student returned.
        """
        if self.read is None or not self.outputs:
            raise ValueError("the student did not run as a whole, expected it to give its logits")
        return self.read(self.outputs[0])


@dataclass(frozen=True)
class StudentCalls:
    """Where in a module the student's inputs and logits are taken from.

    Args:
        student: Name of the student in the module; empty for the module itself.
        logits: Where the logits are; layers are named relative to the student.
        inputs: Whether the student's inputs are wanted: it has to run as a whole then.
        outputs: Whether its logits are.
    """

    student: str = ""
    logits: LogitsPlace = field(default_factory=LogitsPlace)
    inputs: bool = True
    outputs: bool = True

    def student_of(self, module: nn.Module) -> nn.Module:
        return find_layer(module, self.student)

    @contextmanager
    def watch(self, module: nn.Module, layers: Iterable[str] = (), once: bool = False) -> Iterator[Seen]:
        """Note inputs, logits and the layers' outputs while the context lives; the hooks go with it.

        Args:
            module: Holds the student.
            layers: Names relative to the student.
            once: Raise RuntimeError when the student runs a second time, and tell in ``problem`` when it did not run.
        """
        student = self.student_of(module)
        layer = self.logits.layer_in(student)
        source = student if layer is None else find_layer(student, layer)
        whole = (
            f"the student ({self.student!r})" if self.student else f"the student (the {type(module).__name__} itself)"
        )
        giver = whole if layer is None else f"the layer {layer!r}, named by logits=,"
        seen = Seen(read=lambda output: self.logits.read(output, student))

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            # Ahead of the layers' hooks, which could only tell that a layer ran twice.
            if once and seen.inputs:
                seen.problem = _several(whole)
                raise RuntimeError(seen.problem)
            seen.inputs.append((args, kwargs))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if once and seen.outputs:
                seen.problem = _several(giver)
                raise RuntimeError(seen.problem)
            seen.outputs.append(output)

        def compare(_module: nn.Module, _args: Any, output: Any) -> None:
            if not seen.outputs:
                return
            try:
                self.logits.check_unambiguous(output, seen.outputs[-1])
            except ValueError as error:
                seen.problem = str(error)
                raise

        with ExitStack() as hooks:
            if self.inputs:
                hooks.enter_context(student.register_forward_pre_hook(_eager(before), with_kwargs=True))
            hooks.enter_context(source.register_forward_hook(_eager(after)))
            if once and layer is not None:
                hooks.enter_context(student.register_forward_hook(_eager(compare)))
            with capture(student, layers) as features:
                seen.features = features
                yield seen
                # Ahead of capture's own complaint about layers that did not run.
                if self.inputs and not seen.inputs:
                    seen.problem = _never(whole)
                elif self.outputs and not seen.outputs:
                    seen.problem = f"{giver} did not run in training_step, expected once: name one that does"
                if once and seen.problem:
                    raise RuntimeError(seen.problem)


def _eager(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep a hook out of compiled graphs: they would go on writing to the first call's lists."""
    kept_out: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return kept_out


def _several(what: str) -> str:
    return (
        f"{what} ran several times in training_step, expected once: name a network or layer that runs once "
        '(student="...", logits="..."), or call it once on the concatenated inputs'
    )


def _never(what: str) -> str:
    return (
        f"{what} did not run in training_step, expected once: name the network that it calls with "
        'student="..."; where it calls only parts of a network, name the layer that gives the logits with logits="..." '
        "and make the teacher's arguments from the batch with teacher_inputs=. A call of .forward() is not seen: call "
        "the network itself"
    )
