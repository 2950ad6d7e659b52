"""Which term drives the student: the norm of each one's gradient."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from kd_lightning.namespaces import of_both
from kd_lightning.objective import Term

EVERY = 10
"""Logged steps from one measurement to the next, as each takes a backward pass for each term."""
_MOST_PARAMETERS = 100_000_000


def measures_gradients(trainer: Trainer, student: nn.Module) -> bool:
    """Tell whether the norms are measured in this step: the first that is logged, and each tenth after it.

    Not of compiled networks, whose graphs allow one backward pass, of sharded ones, and of more than 100 million
    trained parameters, as memory for a second set of gradients may be missing.
    """
    interval = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
    if ((trainer.global_step + 1) // interval) % EVERY != 1 % EVERY:
        return False
    if not isinstance(trainer.strategy, of_both(SingleDeviceStrategy) + of_both(DDPStrategy)):
        return False
    if any(getattr(part, "_compiled_call_impl", None) or hasattr(part, "_orig_mod") for part in student.modules()):
        return False
    return sum(p.numel() for p in student.parameters() if p.requires_grad) <= _MOST_PARAMETERS


def gradient_norms(terms: Mapping[str, Term], student: nn.Module) -> dict[str, Tensor]:
    """Return the 2-norm of each weighted term's gradient with respect to the student's parameters.

    By ``train/grad_norm/<term>``.

    Of this process's batch. The graphs stay as they are for the backward pass that follows, and so do ``.grad`` and
    the random numbers. A term without a gradient has none here. Where the graph does not allow a pass of its own, as
    with reentrant checkpoints of activations, nothing is returned.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms: dict[str, Tensor] = {}
    for name, term in terms.items():
        if not (term.weighted.requires_grad and parameters):
            continue
        try:
            gradients = torch.autograd.grad(term.weighted, parameters, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return {}
        found = [g.detach().float().norm() for g in gradients if g is not None]
        if found:
            norms[f"train/grad_norm/{name}"] = torch.stack(found).norm()
    return norms
