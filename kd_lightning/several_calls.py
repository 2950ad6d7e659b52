"""What belongs to several calls of a network, as one batch."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kd_lightning.outputs import AnyOutputs, EnsembleOutputs, Outputs, PeerOutputs, Samples, TopK, joined

T = TypeVar("T")


def join(calls: Sequence[AnyOutputs]) -> AnyOutputs:
    """Return a teacher's outputs for several calls as those of one, along the samples.

    Raises:
        ValueError: For outputs whose shapes differ in more than the samples.
    """
    first = calls[0]
    if len(calls) == 1:
        return first
    if isinstance(first, PeerOutputs):
        by_peer = [call.networks for call in calls if isinstance(call, PeerOutputs)]
        return first._replace(networks={name: _join_one([one[name] for one in by_peer]) for name in first.networks})
    if isinstance(first, Outputs):
        return _join_one([call for call in calls if isinstance(call, Outputs)])
    features = {name: joined([call.features[name] for call in calls]) for name in first.features}
    if isinstance(first, TopK):
        best = [call for call in calls if isinstance(call, TopK)]
        return TopK(joined([c.indices for c in best]), joined([c.log_probs for c in best]), features)
    ensembles = [call for call in calls if isinstance(call, EnsembleOutputs)]
    members = tuple(joined(each) for each in zip(*(call.members for call in ensembles), strict=True))
    return first._replace(logits=joined([c.logits for c in ensembles]), members=members, features=features)


def _join_one(calls: Sequence[Outputs]) -> Outputs:
    features = {name: joined([call.features[name] for call in calls]) for name in calls[0].features}
    return Outputs(joined([call.logits for call in calls]), features)


def repeated(value: T, calls: int, rows: int | None = None) -> T:
    """Return a target, or which samples a batch holds, once for each call.

    Args:
        value: Of one call; anything but a tensor or :class:`~kd_lightning.outputs.Samples` is returned as it is.
        calls: How many.
        rows: How many outputs there are; a target that has one for each already is returned as it is.
    """
    if calls == 1:
        return value
    if isinstance(value, Samples):
        return value._replace(ids=value.ids.repeat(calls))
    if isinstance(value, Tensor) and value.ndim and len(value) != rows:
        return torch.cat([value] * calls)  # type: ignore[return-value]
    return value


def check_rows(student: Outputs, teacher: AnyOutputs) -> None:
    """Raise ValueError where teacher and student give outputs for other numbers of samples."""
    if isinstance(teacher, PeerOutputs):
        for peer in teacher.networks.values():
            check_rows(student, peer)
        return
    got, expected = (teacher.indices if isinstance(teacher, TopK) else teacher.logits), student.logits
    if got.numel() and expected.numel() and len(got) != len(expected):
        raise ValueError(
            f"the teacher gives outputs {tuple(got.shape)} and the student {tuple(expected.shape)}, expected as many "
            "samples: let it return a row for each, make the teacher's arguments for all calls of the student with "
            'teacher_inputs=, or take calls="first"'
        )
