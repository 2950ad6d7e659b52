"""The student's view of a sample comes with what the teacher gave for that very view."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, Subset, TensorDataset

from kd_lightning.data import FashionMNIST, WithIds
from kd_lightning.data.loaders import View, shuffled
from kd_lightning.outputs import TopK
from kd_lightning.stored_outputs import StoredOutputs, Views
from kd_lightning.tasks import Classification, Taught
from tests.stored_outputs.data import Augmented, store
from tests.tiny import CLASSES, good_teacher

TEACHER = good_teacher().eval()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Three views of 50 samples, in shards of 40 rows, with a layer."""
    path = tmp_path_factory.mktemp("outputs")
    store(path, views=3, format="float16", layers=["stem"], shard_bytes=40 * (2 * CLASSES + 2 * 16))
    return path


def assert_pairs(batch: Taught) -> None:
    with torch.no_grad():
        expected = TEACHER(batch.batch[0])
        stem = TEACHER.stem(batch.batch[0])
    torch.testing.assert_close(batch.teacher["logits"].float(), expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(batch.teacher["features.stem"].float(), stem, rtol=1e-3, atol=2e-3)


def epoch(loader: DataLoader, number: int) -> list[Taught]:
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(number)
    batches = list(loader)
    for batch in batches:
        assert_pairs(batch)
    return batches


def inputs(batches: list[Taught]) -> torch.Tensor:
    return torch.cat([batch.batch[0] for batch in batches])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_that_live_on_give_what_one_process_gives(outputs, context: str) -> None:
    stored = StoredOutputs(Augmented(), outputs)
    alone = DataLoader(stored, batch_size=16, sampler=Views(stored))
    list(alone)  # files are mapped when the workers are forked
    workers = DataLoader(
        stored,
        16,
        sampler=Views(stored),
        num_workers=2 if context == "fork" else 1,
        persistent_workers=True,
        multiprocessing_context=context,
    )
    seen = [(inputs(epoch(alone, e)), inputs(epoch(workers, e))) for e in (0, 1, 2, 3)]
    assert all(torch.equal(one, two) for one, two in seen)
    views = [{tuple(x) for x in one.tolist()} for one, _ in seen]
    assert views[0] == views[3]  # epoch 3 sees view 0 again, in another order
    assert not views[0] & views[1]
    assert not torch.equal(seen[0][0], seen[3][0])


def test_processes_share_the_samples(outputs) -> None:
    stored = StoredOutputs(Augmented(), outputs)
    parts = [DataLoader(stored, 5, sampler=Views(stored, num_replicas=2, rank=rank)) for rank in (0, 1)]
    found = torch.cat([inputs(epoch(part, 1)) for part in parts])
    assert len({tuple(x) for x in found.tolist()}) == 50


def test_subsets_and_concatenations_around(outputs) -> None:
    stored = StoredOutputs(Augmented(), outputs)
    stored.set_epoch(2)
    around = ConcatDataset([Subset(stored, [7, 49]), Subset(stored, range(10, 20))])
    batches = epoch(DataLoader(around, batch_size=8, sampler=DistributedSampler(around, 1, 0)), 0)
    assert len(inputs(batches)) == 12
    assert torch.equal(around[1].batch[0], stored[View(49, 2)].batch[0])


def test_subsets_and_concatenations_inside(tmp_path) -> None:
    def inside():
        return ConcatDataset([Subset(Augmented(seed=1), [5, 3, 9]), Augmented(20)])

    store(tmp_path, inside(), views=2, format="float16", layers=["stem"])
    stored = StoredOutputs(inside(), tmp_path)
    assert len(inputs(epoch(DataLoader(stored, batch_size=6, sampler=Views(stored)), 1))) == 23


def test_plain_keys_take_the_epoch_that_they_were_told(outputs) -> None:
    stored = StoredOutputs(Augmented(), outputs)
    with pytest.raises(ValueError, match=r"3 views of each sample are stored.*sampler=Views\(dataset\).*set_epoch"):
        stored[0]
    loader = DataLoader(stored, batch_size=25, num_workers=1, persistent_workers=True)
    for e in (0, 1, 5):
        stored.set_epoch(e)
        found = inputs(epoch(loader, e))
        assert torch.equal(found[4], stored[View(4, e)].batch[0])


def test_plain_keys_need_no_epoch_for_one_view(tmp_path) -> None:
    store(tmp_path, format="float16", layers=["stem"])
    stored = StoredOutputs(Augmented(), tmp_path)
    assert len(inputs(epoch(DataLoader(stored, batch_size=16, shuffle=True), 0))) == 50
    assert torch.equal(stored[-1].batch[0], stored[49].batch[0])
    with pytest.raises(IndexError):
        stored[50]


def test_a_copy_maps_the_files_for_itself(outputs) -> None:
    stored = StoredOutputs(Augmented(), outputs)
    before = stored[View(3, 1)]
    copy = pickle.loads(pickle.dumps(stored.outputs([View(3, 1)])))
    assert torch.equal(copy["logits"][0], before.teacher["logits"])
    assert len(pickle.dumps(stored._readers)) < 10_000


def test_ids_go_around(outputs) -> None:
    stored = WithIds(StoredOutputs(Augmented(), outputs))
    batch = next(iter(DataLoader(stored, batch_size=4, sampler=Views(stored))))
    read = Classification().read(batch)
    assert read.samples is not None
    assert torch.equal(read.samples.ids, torch.tensor([k.sample for k in list(Views(stored))[:4]]))
    assert read.teacher is not None
    torch.testing.assert_close(read.teacher.logits.float(), TEACHER(*read.args), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_our_data_modules_batches_and_loaders(tmp_path, workers: int) -> None:
    data = FashionMNIST(labelled=40)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    store(tmp_path, data.training_set(), network, format="float16", views=2)
    stored = StoredOutputs(data.training_set(), tmp_path, teacher=network)
    loader = shuffled(stored, batch_size=16, seed=5, num_workers=workers)
    for batch in loader:
        with torch.no_grad():
            torch.testing.assert_close(batch.teacher["logits"].float(), network(batch.batch[0]), rtol=1e-3, atol=1e-3)


def test_only_the_best_classes(tmp_path) -> None:
    store(tmp_path, format="top2")
    stored = StoredOutputs(Augmented(), tmp_path)
    batch = Classification().read(next(iter(DataLoader(stored, batch_size=50))))
    assert batch.teacher is not None
    assert isinstance(batch.teacher, TopK)
    log_probs, indices = TEACHER(*batch.args).log_softmax(-1).topk(2)
    assert torch.equal(batch.teacher.indices, indices)
    torch.testing.assert_close(batch.teacher.log_probs, log_probs, rtol=1e-3, atol=2e-3)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(7, 11)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(input_ids)}


class Texts(TensorDataset):
    def __getitem__(self, index):
        return {"input_ids": self.tensors[0][index], "labels": self.tensors[0][index]}


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
@pytest.mark.parametrize("format", ["float16", "uint8"])
def test_pixels_and_tokens(tmp_path, kind: str, format: str) -> None:
    network = Pixels() if kind == "pixels" else Tokens()
    random = torch.Generator().manual_seed(0)
    dataset = (
        TensorDataset(torch.randn(9, 2, 4, 5, generator=random), torch.zeros(9, 4, 5).long())
        if kind == "pixels"
        else Texts(torch.randint(7, (9, 6), generator=random))
    )
    store(tmp_path, dataset, network, format=format, batch_size=4)
    read = Classification().read(next(iter(DataLoader(StoredOutputs(dataset, tmp_path), batch_size=9))))
    with torch.no_grad():
        exact = network(*read.args, **read.kwargs)
    exact = exact if kind == "pixels" else exact["logits"]
    assert read.teacher is not None
    torch.testing.assert_close(read.teacher.logits.float(), exact, rtol=1e-2, atol=2e-2)


def test_samples_of_different_shapes_are_refused(tmp_path) -> None:
    ragged = [({"input_ids": torch.zeros(3 + i // 4, dtype=torch.long)}, torch.tensor(0)) for i in range(8)]
    with pytest.raises(
        ValueError, match=r"logits are \(4, 11\) for samples 4 to 7, expected \(3, 11\) as for the first"
    ):
        store(tmp_path, ragged, Tokens(), batch_size=4)


def test_what_is_written_is_said(tmp_path, capsys) -> None:
    from kd_lightning.stored_outputs import store_outputs

    manifest = store_outputs(TEACHER, Augmented(), tmp_path, views=2, batch_size=10, commit_seconds=0)
    said = capsys.readouterr().out
    assert "10 of 100 views (10%)" in said
    assert "a second" in said
    assert "50 samples × 2 views as uint8, 12 bytes of logits a view" in said
    assert f"{manifest.kl['1']['mean']:.1e} (at most {manifest.kl['1']['max']:.1e}) at T = 1" in said
    assert manifest.kl["4"]["mean"] < manifest.kl["1"]["mean"] < 1e-4
    stored = StoredOutputs(Augmented(), tmp_path).outputs([View(i, v) for v in (0, 1) for i in range(50)])["logits"]
    seen = [replayed_input(i, v) for v in (0, 1) for i in range(50)]
    with torch.no_grad():
        exact = TEACHER(torch.stack(seen))
    error = (exact.softmax(-1) * (exact.log_softmax(-1) - stored.log_softmax(-1))).sum(-1).mean()
    assert np.isclose(float(error), manifest.kl["1"]["mean"], rtol=0.05)


def replayed_input(sample: int, view: int) -> torch.Tensor:
    from kd_lightning.stored_outputs.replay import ReplayedViews

    return ReplayedViews(Augmented(), 0)[View(sample, view)][0]
