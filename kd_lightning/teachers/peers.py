"""Networks that are trained together: Deep Mutual Learning (Zhang et al., CVPR 2018), https://arxiv.org/abs/1706.00384."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from kd_lightning.dry_forward import dry_forward
from kd_lightning.outputs import PeerOutputs, run
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.base import TeacherSource


class Peers(TeacherSource):
    """Other students, which are trained along with the student: all learn from the labels and from each other.

    The loss of network k is the mean over the others l of the losses with l's detached predictions in the teacher's
    place. With ``{"hard_label": HardLabel(), "kd": KD(temperature=1.0)}`` it is that of the paper:
    L_k = CE(y, p_k) + 1/(K − 1)·Σ_{l≠k} KL(p_l ‖ p_k). All take their step at once, on predictions from before it, and
    with one optimizer: as predictions are detached, it is that of an optimizer of its own for each; only clipping by
    the norm goes over all. The paper's algorithm lets them take turns, with new predictions after each, at twice the
    forward passes.

    Each peer has losses of its own, whose weights, temperatures and other numbers follow the student's; they are logged
    as ``train/loss/<loss>/<peer>``. Peers are in the checkpoint beside the losses, and
    :func:`~kd_lightning.load_student` takes one by its name. The teacher's scores are those of their average, and of
    each. A module under :class:`~kd_lightning.Distillation` keeps its own loss for itself: add ``hard_label`` to the
    losses, for all, and pass ``task_weight=0``.

    Args:
        networks: By name; of any architectures with the student's classes.

    Raises:
        ValueError: For no network, the same one twice, what is none, or a name that no module can have; with losses
            that read layers or look into a network, or none that compares; and before training, for whatever
            :mod:`kd_lightning.preflight` finds of each.

    Example:
        >>> peers = Peers({"deep": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))})
    """

    learns = True

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        if not networks or len({id(network) for network in networks.values()}) < len(networks):
            raise ValueError(
                f"expected one or more peers, each a network of its own, got {list(networks)}: pass for instance "
                "Peers({'b': network})"
            )
        for name, network in networks.items():
            if not isinstance(network, nn.Module):
                raise ValueError(f"expected a network (nn.Module) as peer {name!r}, got a {type(network).__name__}")
            if not isinstance(name, str) or not name or "." in name or "/" in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"expected a peer's name to be a word without dots, got {name!r}: rename it")
        self.peers = dict(networks)

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> PeerOutputs:
        if not torch.is_grad_enabled():  # in validation also where the module that holds them is none of Lightning's
            for network in self.peers.values():
                network.eval()
        return PeerOutputs({name: run(network, batch.args, batch.kwargs) for name, network in self.peers.items()})

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> PeerOutputs:
        return PeerOutputs(
            {
                name: dry_forward(f"peer {name!r}", network, batch.args, batch.kwargs, ())
                for name, network in self.peers.items()
            }
        )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for network in self.peers.values():
            network.to(device, dtype)
