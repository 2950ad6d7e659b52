"""The networks, what of them is trained, and whether the losses have the teacher that they need."""

from collections.abc import Iterable, Mapping
from os import PathLike

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd_lightning.checkpoint import mismatch
from kd_lightning.objective import DistillationObjective
from kd_lightning.tasks import Task
from kd_lightning.teachers import TeacherSource
from kd_lightning.teachers.base import peers_of


def check_parts(teacher: TeacherSource | None, objective: DistillationObjective) -> None:
    """Raise ValueError when a loss needs a teacher, or its network, and none is there."""
    if teacher is not None and not isinstance(teacher, TeacherSource):
        raise ValueError(
            f"expected a network or a source such as Teacher(network) as teacher, got {_a(teacher)}: {_made(teacher)}"
        )
    if teacher is None and objective.needs_teacher:
        names = [name for name, loss in objective.named_losses().items() if loss.needs_teacher]
        raise ValueError(f"losses {names} need a teacher, got teacher=None: pass a Teacher, or leave these losses out")
    looking = [name for name, loss in objective.named_losses().items() if loss.needs_teacher_network]
    if looking and teacher is not None and teacher.network is None:
        raise ValueError(
            f"losses {looking} look into the teacher's network, expected one that is there, got "
            f"{type(teacher).__name__}: pass Teacher(network), or leave these losses out"
        )


def check_networks(student: nn.Module, teacher: TeacherSource | nn.Module | None) -> None:
    """Raise ValueError for a student that is no network, or is the teacher."""
    if not isinstance(student, nn.Module):
        raise ValueError(f"expected a network (nn.Module) as student, got {_a(student)}: a teacher goes to teacher=")
    networks = (teacher, getattr(teacher, "network", None), *peers_of(teacher).values())
    part_of = [network for network in networks if isinstance(network, nn.Module) and student in set(network.modules())]
    if part_of:
        same = (
            "student and teacher are the same network" if student in part_of else "the student is a part of the teacher"
        )
        raise ValueError(
            f"{same}, expected two networks: pass copy.deepcopy(student) as teacher, or Momentum() for the student's "
            "own average"
        )


def check_trainable(student: nn.Module) -> None:
    """Raise ValueError for a student of which nothing can be trained."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"the student {type(student).__name__} is frozen: none of its parameters requires a gradient, expected "
            "some that are trained: call student.requires_grad_(True), as a network that was a teacher needs; or "
            "have student and teacher changed places?"
        )


def check_factories(optimizer: object, scheduler: object) -> None:
    """Raise ValueError for an optimizer or a scheduler in the place of a function that makes one."""
    for name, made, example in (
        ("optimizer", optimizer, "lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"),
        ("scheduler", scheduler, "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100)"),
    ):
        if made is not None and (not callable(made) or isinstance(made, Optimizer | LRScheduler)):
            raise ValueError(
                f"expected {name}= to be a function that makes it, as it is made when training begins, got {_a(made)}: "
                f"pass {name}={example}"
            )


def check_optimizer(optimizers: Iterable[Optimizer], trained: Mapping[str, nn.Parameter], of: str = "student") -> None:
    """Raise ValueError for an optimizer without parameters that require a gradient.

    Args:
        optimizers: All of a training.
        trained: By name; those that are frozen may be missing in the optimizers.
        of: Whose parameters they are.
    """
    optimizers = list(optimizers)
    foreign = [_a(optimizer) for optimizer in optimizers if not isinstance(optimizer, Optimizer)]
    if foreign:
        raise ValueError(f"expected optimizer= to make a torch.optim.Optimizer, got {foreign[0]}: return the optimizer")
    optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    expected = [name for name, parameter in trained.items() if parameter.requires_grad]
    missing = [name for name in expected if id(trained[name]) not in optimized]
    if missing:
        raise ValueError(
            f"the optimizer leaves out {len(missing)} of {len(expected)} parameters of the {of} "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}), expected it to train all that require a "
            "gradient: build it from the parameters that it is given, or call requires_grad_(False) on those that "
            "are to stay"
        )


def check_checkpoint(state: Mapping[str, Tensor], student: nn.Module) -> None:
    """Raise ValueError when a checkpoint does not hold this student."""
    problem = mismatch(student, state)
    if problem:
        raise ValueError(f"the checkpoint does not fit the student {type(student).__name__}: {problem}")


def check_task(task: object) -> None:
    """Raise TypeError for what is no task."""
    if not isinstance(task, Task):
        name = task.__name__ if isinstance(task, type) else "Classification"
        raise TypeError(f"expected a task as task=, got {_a(task)}: pass for instance task={name}()")


def _made(teacher: object) -> str:
    """Say how what was passed becomes a teacher."""
    if isinstance(teacher, type):
        return f"make one, {teacher.__name__}(...)"
    if isinstance(teacher, str | PathLike | Mapping):
        return "make the network, and load the weights into it, such as Teacher(network, checkpoint=path)"
    if isinstance(teacher, list | tuple):
        return "several teach as Ensemble([...])"
    return "wrap it in a module whose forward calls it"


def _a(value: object) -> str:
    return f"{value!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"
