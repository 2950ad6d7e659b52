"""Outputs of several networks on the same test units: which, how many, in which order."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.pipeline import soft_outputs
from kd_lightning.tasks import Classification, TokenClassification

X, Y = torch.arange(100.0)[:, None].repeat(1, 3), torch.arange(100) % 4


def outputs(loader, task=None, total=100):
    torch.manual_seed(0)
    networks = {"teacher": [nn.Linear(3, 4)], "student": [nn.Linear(3, 4), nn.Linear(3, 4)]}
    return soft_outputs.soft_outputs(task or Classification(), networks, loader, total), networks


def test_a_small_split_is_looked_at_whole_and_in_order() -> None:
    found, networks = outputs(DataLoader(TensorDataset(X, Y), batch_size=30))
    assert (found.units, found.total) == (100, 100)
    assert found.target.tolist() == Y.tolist()
    for key, several in networks.items():
        for network, logits in zip(several, found.logits[key], strict=True):
            torch.testing.assert_close(torch.from_numpy(logits), network(X).detach())


@pytest.mark.parametrize("batch_size", [1, 7, 30, 100])
def test_of_a_large_split_as_much_as_may_be_evenly(batch_size, monkeypatch) -> None:
    monkeypatch.setattr(soft_outputs, "MOST_OUTPUTS", 20)
    found, _ = outputs(DataLoader(TensorDataset(X, Y), batch_size=batch_size))
    assert 15 <= found.units <= 20
    units = torch.cat([batch.args[0][:, 0] for batch in found.batches])
    assert len(set(units.tolist())) == len(units) == len(found.target)
    if batch_size < 10:
        assert units.diff().max() <= 10


def test_texts_of_several_lengths_are_padded(monkeypatch) -> None:
    texts = [(torch.rand(2, length, 3), torch.zeros(2, length, dtype=torch.int64)) for length in (4, 6)]
    found, _ = outputs(texts, TokenClassification(), total=4)
    assert found.logits["teacher"][0].shape == (4, 6, 4)
    assert (found.target == -100).sum() == 4
    assert np.isfinite(found.logits["teacher"][0]).all()
