"""Which term drives the student: the norm of each one's gradient."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from kd_lightning.namespaces import of_both
from kd_lightning.objective import Term

EVERY = 10
"""Logged steps from one measurement to the next, as each takes a backward pass for each term."""
_MOST_PARAMETERS = 30_000_000


def measures_gradients(trainer: Trainer, student: nn.Module) -> bool:
    """Tell whether the norms are measured in this step: the first that is logged, and each tenth after it.

    Not of sharded networks, and of more than 30 million trained parameters, as memory for a second set of gradients
    may be missing.
    """
    interval = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
    if ((trainer.global_step + 1) // interval) % EVERY != 1 % EVERY:
        return False
    if not isinstance(trainer.strategy, of_both(SingleDeviceStrategy) + of_both(DDPStrategy)):
        return False
    return sum(p.numel() for p in student.parameters() if p.requires_grad) <= _MOST_PARAMETERS


def gradient_norms(terms: Mapping[str, Term], student: nn.Module) -> dict[str, Tensor]:
    """Return the 2-norm of each weighted term's gradient with respect to the student's parameters.

    By ``train/grad_norm/<term>``, of this process's batch. The graphs stay as they are for the backward pass that
    follows, and so do ``.grad`` and the random numbers. Left out are terms without a gradient, and those whose graph
    need not survive a second pass.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms: dict[str, Tensor] = {}
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    for name, term in terms.items():
        if not (term.weighted.requires_grad and parameters and _can_pass_twice(term.weighted)):
            continue
        gradients = torch.autograd.grad(term.weighted, parameters, retain_graph=True, allow_unused=True)
        found = [g.detach().float().norm() for g in gradients if g is not None]
        if found:
            norms[f"train/grad_norm/{name}"] = torch.stack(found).norm()
    with torch.no_grad():
        for buffer, value in buffers:
            if not torch.equal(buffer, value):  # checkpoints of activations call the network again, batch norm and all
                buffer.copy_(value)
    return norms


def _can_pass_twice(term: Tensor) -> bool:
    """Tell whether a backward pass leaves a graph as it was: nothing in it is written in Python by somebody else.

    PyTorch's operators do. Kernels of other libraries may write their gradients into what they have saved, which only
    they would know; a compiled network's saved tensors are given away, and reentrant checkpoints refuse.
    """
    waiting, seen = [term.grad_fn], set[object]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            forward = getattr(type(node), "_forward_cls", None)
            if getattr(forward, "__module__", "").partition(".")[0] != __package__.partition(".")[0]:
                return False
        waiting += [following for following, _ in node.next_functions]
    return True
