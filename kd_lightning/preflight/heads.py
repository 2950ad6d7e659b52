"""Losses that compute the logits themselves: whether what they compute is what the network gives."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.dry_forward import dry_forward
from kd_lightning.idle_heads import idle
from kd_lightning.losses.fused_loss import FusedLoss, head_of
from kd_lightning.objective import DistillationObjective, errors_name
from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.tasks import Batch

_TOKENS = 64  # so many are compared: all logits may be gigabytes
_WHOLE, _HALF = 1e-5, 2e-2
"""Of the largest logit: how far those of a network and those of the loss may lie apart, by rounding alone."""


def check_heads(
    objective: DistillationObjective,
    student: Outputs,
    teacher: AnyOutputs | None,
    student_network: nn.Module,
    teacher_network: nn.Module | None,
) -> None:
    """Compare each head's product with a layer's output, as its loss takes it, with the network's own logits.

    Args:
        objective: Its losses have seen such networks.
        student: Outputs for a few samples, with the logits; where there are none, nothing is compared.
        teacher: Likewise.
        student_network: That gave them.
        teacher_network: Likewise; None where outputs alone are known.

    Raises:
        ValueError: For layers that give no (B, S, D) or (B, D) of the head's width, and for other logits.
    """
    for name, loss in objective.named_losses().items():
        if not isinstance(loss, FusedLoss):
            continue
        with errors_name(name, loss):
            weights = head_of("student", student_network, loss.student_head)
            hidden = student.features[loss.student_layers[0]]
            _check_head("student", loss.student_head, student.logits, hidden, *weights)
            if not loss.needs_teacher or isinstance(teacher, TopK) or teacher is None:
                continue
            if loss.teacher_head is not None and teacher_network is not None:
                weights = head_of("teacher", teacher_network, loss.teacher_head)
                hidden = teacher.features[loss.teacher_layers[0]]
                _check_head("teacher", loss.teacher_head, teacher.logits, hidden, *weights)


@torch.no_grad()
def _check_head(role: str, head: str, logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the {role}'s layer gives {tuple(hidden.shape)}, expected (B, S, {weight.shape[1]}) or "
            f"(B, {weight.shape[1]}), as the head {head!r} with weight {tuple(weight.shape)} takes it: name the layer "
            "right before the head"
        )
    if not logits.numel():
        return
    shape = (*hidden.shape[:-1], len(weight))
    if logits.shape != shape:
        raise ValueError(
            f"the head {head!r} makes logits {shape} of the {role}'s layer, and the {role} itself gives "
            f"{tuple(logits.shape)}, expected the same: name the head that the {role}'s own logits come from"
        )
    half = any(x.dtype in (torch.float16, torch.bfloat16) for x in (logits, hidden, weight))
    given, some = (x.flatten(0, -2)[:: max(1, x[..., 0].numel() // _TOKENS)].float() for x in (logits, hidden))
    made = F.linear(*(x if x is None else x.to(given) for x in (some, weight, bias)))  # type: ignore[arg-type]
    largest, apart = given.abs().max().item(), (made - given).abs().max().item()
    if not apart <= (_HALF if half else _WHOLE) * largest:
        raise ValueError(
            f"the {role}'s logits are not those of the head {head!r} on this layer: they lie up to {apart:.2g} apart, "
            f"where the largest is {largest:.2g}, expected the head's product alone. Is another layer what the head "
            f"takes, are the logits scaled or capped afterwards, or does the teacher consist of several? Name the "
            "layer right before the head, or take losses on logits"
        )


def check_runs_without_logits(role: str, network: nn.Module, batch: Batch, heads: tuple[str, ...]) -> None:
    """Run a network as in training, where its heads give no logits.

    Raises:
        ValueError: Where it cannot go on without them.
    """
    if not heads:
        return
    try:
        with idle(network, heads):
            dry_forward(role, network, batch.args, batch.kwargs, ())
    except ValueError as error:
        raise ValueError(
            f"the {role} does not run where its heads {list(heads)} return (..., 0) in the place of logits, which no "
            f"loss reads: {error}; expected it to return what they give: let it, or take losses on logits"
        ) from error


def check_inputs(objective: DistillationObjective, inputs: Mapping[str, Tensor], student: Outputs) -> None:
    """Compare what the student's heads got in training, as they were idle, with what their losses take instead.

    Raises:
        ValueError: Where it is something else than in eval mode, in which all was compared before.
    """
    for name, loss in objective.named_losses().items():
        if not isinstance(loss, FusedLoss) or loss.student_head not in inputs:
            continue
        got, taken = inputs[loss.student_head], student.features[loss.student_layers[0]]
        if got.shape != taken.shape or not torch.equal(got.to(taken.dtype), taken):
            raise ValueError(
                f"loss {name!r}: in training the student's head {loss.student_head!r} gets something else than the "
                f"output of {loss.student_layers[0]!r}, expected the same (dropout in between?): name the layer right "
                "before the head"
            )
