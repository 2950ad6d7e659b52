"""Hang losses on a LightningModule that stays as it is, and take them off again."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from kd_lightning.objective import DistillationObjective, find_objective
from kd_lightning.selection import describe

_CHILD = "distillation"

Step = Callable[..., Any]


def attach(module: LightningModule, objective: DistillationObjective, wrap: Callable[[Step], Step]) -> ExitStack:
    """Make losses a part of a module, but of no checkpoint's ``state_dict``, and put a step around its own.

    The losses are a submodule before ``configure_optimizers`` is called: ``self.parameters()`` has the projectors, DDP
    reduces their gradients, clipping counts them, and they are moved along.

    Args:
        module: Gets the losses under the name ``distillation``.
        objective: Has the losses.
        wrap: Makes the new ``training_step`` of the module's own.

    Returns:
        What leaves the module as it was, once it is closed.
    """
    undo = ExitStack()
    module.add_module(_CHILD, objective)
    undo.callback(module.__delattr__, _CHILD)
    saving = module.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
    loading = module.register_load_state_dict_post_hook(_is_not_missing)  # type: ignore[no-untyped-call]
    undo.callback(saving.remove)
    undo.callback(loading.remove)
    # torch.compile(module) has put a step of its own on the instance; otherwise the class has it.
    own = vars(module).get("training_step")
    undo.callback(_restore_step, module, own)
    module.training_step = wrap(module.training_step)  # type: ignore[method-assign]
    return undo


def check_module(module: LightningModule) -> None:
    """Raise ValueError for a module to which no losses can be added."""
    name = type(module).__name__
    if find_objective(module) is not None:
        raise ValueError(
            f"{name} is distilled already: one DistillationModule, or one Distillation, with all the losses"
        )
    if hasattr(module, _CHILD):
        raise ValueError(f"{name} has an attribute {_CHILD!r} of its own, where the losses are to hang: rename it")
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes manually, expected automatic optimization: its training_step makes the backward pass "
            "before a loss could be added; call kd_lightning.objective.DistillationObjective there, in one line, as "
            'the README shows under "Manual optimization"'
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(f"{name}.training_step takes dataloader_iter, expected it to take the batch")


def check_loss(returned: Any, trained_by: bool = False) -> None:
    """Raise ValueError for what ``training_step`` returns as its loss, and is none.

    Args:
        returned: By the step; None where it skips the batch.
        trained_by: Whether it is part of the total.
    """
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if loss is None:
        return
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"training_step returns {describe(loss)}, expected its loss, a tensor of one number: return that, or a "
            "mapping that has it as 'loss'"
        )
    if trained_by and not loss.requires_grad:
        raise ValueError(
            "the loss that training_step returns has no graph, expected one to train by: is it detached, or computed "
            "under torch.no_grad()? task_weight=0 leaves it out"
        )


def check_strategy(strategy: Strategy, objective: DistillationObjective) -> None:
    """Raise ValueError for losses whose parameters a strategy would split along with the module's."""
    # Its checkpoints ask the module's state_dict for all that was made flat, of which the losses' part is left out.
    losses = [name for name, loss in objective.named_losses().items() if next(loss.parameters(), None) is not None]
    if losses and type(strategy).__name__ == "FSDPStrategy":
        raise ValueError(
            f"FSDPStrategy makes one flat tensor of all that a module has, and losses {losses} have parameters of "
            'their own, which are to be in no checkpoint of the module: take strategy="ddp", or losses that have none'
        )


def check_averaging(trainer: Trainer, callback: object, objective: DistillationObjective) -> None:
    """Raise ValueError for weights that are averaged by a callback which has copied the module without the losses."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    earlier = callbacks[: callbacks.index(callback)]
    # As WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging call their copy, by which they go through
    # both modules' parameters side by side.
    name = next((type(c).__name__ for c in earlier if hasattr(c, "_average_model")), None)
    if name is not None and next(objective.parameters(), None) is not None:
        raise ValueError(
            f"{name} has copied the module before it gets the projectors, expected to come later: put Distillation "
            "before it in callbacks"
        )


def check_optimized(trainer: Trainer, objective: DistillationObjective, add: bool) -> None:
    """See to it that the optimizer trains the losses' parameters.

    Args:
        trainer: Has the optimizer.
        objective: Has the losses.
        add: Whether those that are left out are added to the first of several groups; to a single one they are.

    Raises:
        ValueError: Where they are left out, and are not, or cannot be added.
    """
    optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    missing = {n: p for n, p in objective.named_parameters() if p.requires_grad and id(p) not in optimized}
    if not missing:
        return
    left_out = f"the optimizer leaves out {len(missing)} parameters of the losses ({', '.join(list(missing)[:3])})"
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if not add and len(groups) != 1:
        raise ValueError(
            f"{left_out} and has {len(groups)} groups, expected them to be trained: pass Distillation(..., "
            "add_parameters=True), which adds them to its first group, build it from self.parameters() in "
            "configure_optimizers, or take losses without projectors"
        )
    _add_to_optimizer(trainer, list(missing.values()))
    rank_zero_info(f"{left_out}: they are trained by the settings of its {'first' if add else 'only'} group")


def _add_to_optimizer(trainer: Trainer, parameters: list[nn.Parameter]) -> None:
    # Into a group that is there, not one of their own: schedulers are made already, and count the groups. And before
    # a checkpoint's optimizer states are loaded, which Lightning does after on_fit_start.
    optimizer = trainer.optimizers[0]
    made = type(optimizer).__name__
    spreading = type(trainer.strategy).__name__ in ("DeepSpeedStrategy", "FSDPStrategy")
    if optimizer.state or spreading or made == "ZeroRedundancyOptimizer":
        why = "as it has made its state already" if optimizer.state else "which spreads them over processes"
        raise ValueError(
            f"the losses' parameters cannot be added to {made} {why}, expected to before the first step: build the "
            "optimizer from self.parameters() in configure_optimizers"
        )
    optimizer.param_groups[0]["params"].extend(parameters)


def _restore_step(module: LightningModule, own: Callable[..., Any] | None) -> None:
    del module.training_step
    if own is not None:
        module.training_step = own  # type: ignore[method-assign]


# Plain functions: torch sets an attribute on them, and a copy of the module has them too.
def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{_CHILD}.")]:
        del state[key]


def _is_not_missing(module: nn.Module, incompatible: Any) -> None:
    own = tuple(f".{_CHILD}.{name}" for name in getattr(module, _CHILD).state_dict())
    # With a prefix where the module is part of another, as in an AveragedModel.
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not f".{k}".endswith(own)]
