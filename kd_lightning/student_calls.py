"""Watch a network that somebody else calls."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from kd_lightning.logits_place import LogitsPlace
from kd_lightning.outputs import check_name, find_layer, in_backward, joined, ran_several_times, tap

Calls: TypeAlias = Literal["once", "first", "all"]


@dataclass
class Seen:
    """What went in and out of the student while it was watched."""

    inputs: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    runs: Mapping[str, list[Tensor]] = field(default_factory=dict)
    """Outputs of each layer, one a run."""
    read: Callable[[Any], Tensor] | None = None
    """Takes the logits out of one of :attr:`outputs`."""
    joined: bool = False
    """Whether logits and features are those of all calls, one after the other; else of the first."""
    problem: str = ""
    """What is missing, and the remedy; empty where nothing is."""

    @property
    def logits(self) -> Tensor:
        """Those of the first forward pass, or of all.

        Raises:
            ValueError: When they are not in what the student returned.
        """
        if self.read is None or not self.outputs:
            raise ValueError("the student did not run as a whole, expected it to give its logits")
        return joined([self.read(output) for output in (self.outputs if self.joined else self.outputs[:1])])

    @property
    def features(self) -> dict[str, Tensor]:
        """The layers' outputs, likewise."""
        return {name: joined(outputs) for name, outputs in self.runs.items() if outputs}

    @property
    def calls(self) -> int:
        """How many calls logits and features are of."""
        return max(len(self.inputs), len(self.outputs), 1) if self.joined else 1


@dataclass(frozen=True)
class StudentCalls:
    """Where in a module the student's inputs and logits are taken from.

    Args:
        student: Name of the student in the module; empty for the module itself.
        logits: Where the logits are; layers are named relative to the student.
        inputs: Whether the student's inputs are wanted: it has to run as a whole then.
        outputs: Whether its logits are.
        calls: Of several calls in a training step: an error (``"once"``), the first, or all.

    Raises:
        ValueError: For other ``calls``.
    """

    student: str = ""
    logits: LogitsPlace = field(default_factory=LogitsPlace)
    inputs: bool = True
    outputs: bool = True
    calls: Calls = "once"

    def __post_init__(self) -> None:
        check_name("student", self.student)
        if self.calls not in get_args(Calls):
            raise ValueError(f"expected calls to be one of {', '.join(get_args(Calls))}, got {self.calls!r}")

    def student_of(self, module: nn.Module) -> nn.Module:
        return find_layer(module, self.student)

    @contextmanager
    def watch(self, module: nn.Module, layers: Iterable[str] = (), once: bool = False) -> Iterator[Seen]:
        """Note inputs, logits and the layers' outputs while the context lives; the hooks go with it.

        Args:
            module: Holds the student.
            layers: Names relative to the student.
            once: Raise RuntimeError when the student runs a second time (unless :attr:`calls` says what to do then),
                and tell in ``problem`` when it did not run.
        """
        student = self.student_of(module)
        layer = self.logits.layer_in(student)
        source = student if layer is None else find_layer(student, layer)
        whole = (
            f"the student ({self.student!r})" if self.student else f"the student (the {type(module).__name__} itself)"
        )
        giver = whole if layer is None else f"the layer {layer!r}, named by logits=,"
        runs: dict[str, list[Tensor]] = {name: [] for name in layers}
        mode = self.calls if once else "all"
        seen = Seen(runs=runs, read=lambda output: self.logits.read(output, student), joined=once and mode == "all")

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if in_backward():
                return
            # Ahead of the layers' hooks, which could only tell that a layer ran twice.
            if seen.inputs and mode == "once":
                seen.problem = _several(whole)
                raise RuntimeError(seen.problem)
            seen.inputs.append((args, kwargs))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if in_backward():
                return
            if seen.outputs and mode == "once":
                seen.problem = _several(giver)
                raise RuntimeError(seen.problem)
            seen.outputs.append(output)

        def take(name: str, output: Tensor) -> bool:
            # In the student's first call, or in each call as often as it was called.
            call = max(len(seen.inputs) if self.inputs else len(runs[name]) + 1, 1)
            if call > 1 and mode == "first":
                return False
            if len(runs[name]) >= call:
                raise ran_several_times(name)
            runs[name].append(output)
            return True

        def compare(_module: nn.Module, _args: Any, output: Any) -> None:
            if not seen.outputs or in_backward():
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
            with tap(student, runs, take):
                yield seen
                # Ahead of capture's own complaint about layers that did not run.
                if self.inputs and not seen.inputs:
                    seen.problem = _never(whole)
                elif self.outputs and not seen.outputs:
                    seen.problem = f"{giver} did not run in training_step, expected once: name one that does"
                elif seen.joined and self.inputs:
                    counts = {giver: len(seen.outputs)} if self.outputs else {}
                    counts |= {f"the layer {name!r}": len(outputs) for name, outputs in runs.items()}
                    other = next((name for name, count in counts.items() if count != len(seen.inputs)), None)
                    if other is not None:
                        seen.problem = (
                            f"{other} ran {counts[other]} times in training_step and {whole} {len(seen.inputs)} times, "
                            'expected as many: name one that runs in each call, or take calls="first"'
                        )
                if once and seen.problem:
                    raise RuntimeError(seen.problem)


def _eager(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep a hook out of compiled graphs: they would go on writing to the first call's lists."""
    kept_out: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return kept_out


def _several(what: str) -> str:
    return (
        f"{what} ran several times in training_step, expected once: name a network or layer that runs once "
        '(student="...", logits="..."), or say which calls count: calls="all" (one after the other, for teacher and '
        'losses alike) or calls="first"'
    )


def _never(what: str) -> str:
    return (
        f"{what} did not run in training_step, expected once: name the network that it calls with "
        'student="..."; where it calls only parts of a network, name the layer that gives the logits with logits="..." '
        "and make the teacher's arguments from the batch with teacher_inputs=. A call of .forward() is not seen: call "
        "the network itself"
    )
