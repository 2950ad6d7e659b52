"""A network that is made with its finished weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd_lightning.losses import KD
from kd_lightning.pipeline.training import PRETRAINED
from kd_lightning.preflight.weights import check_weights
from kd_lightning.tasks import Classification
from tests.pipeline.tiny_training import TinyData, run, training
from tests.tiny import Network


def made(weight: float = 0.5) -> nn.Module:
    torch.manual_seed(3)
    network = Network(16)
    with torch.no_grad():
        next(network.parameters()).fill_(weight)
    return network


def state(network: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_it_teaches_as_it_is(tmp_path: Path) -> None:
    teacher = run(tmp_path, training("teacher", network=made, checkpoint=PRETRAINED))
    assert teacher.result.figures["train_seconds"] == 0
    assert all(torch.equal(value, made().state_dict()[name]) for name, value in teacher.network().state_dict().items())
    student = run(tmp_path, training("distilled", losses=lambda: {"kd": KD()}), teacher)
    assert student.result.figures["train_seconds"] > 0


def test_with_other_weights_it_is_another_stage() -> None:
    data = training("teacher").make_data()
    of = [
        training("teacher", network=lambda weight=weight: made(weight), checkpoint=PRETRAINED).fingerprint(data, None)
        for weight in (0.5, 0.5, 0.6)
    ]
    assert of[0] == of[1] != of[2]
    assert isinstance(data.module, TinyData)


def test_weights_that_are_not_finite_are_refused() -> None:
    batch = Classification().read(next(iter(training("teacher").make_data().val_dataloader())))
    with pytest.raises(ValueError, match="Network holds NaN or infinite weights in"):
        check_weights(made(float("nan")), None, batch, Classification())
