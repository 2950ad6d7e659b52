"""A folder that fsspec reaches gives what a folder on this machine gives."""

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from kd_lightning.data.loaders import View
from kd_lightning.stored_outputs import StoredOutputs, Views, store_outputs, verify
from kd_lightning.stored_outputs.store import Store
from tests.stored_outputs.data import Augmented, comparable, files, store
from tests.tiny import good_teacher

OPTIONS = {"views": 2, "shard_bytes": 40 * 12}


@pytest.fixture
def address(tmp_path, monkeypatch):
    """An empty folder in memory; what is kept of it on this machine is in ``tmp_path``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    yield "memory://outputs"
    memory.rm("/outputs", recursive=True)


def remote_files():
    memory = fsspec.filesystem("memory")
    found = memory.find("/outputs")
    return {name.removeprefix("/outputs/"): comparable(name, memory.cat_file(name)) for name in found}


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_holds_the_same_bytes_and_is_read_by_workers(address, tmp_path, workers: int) -> None:
    store(address, **OPTIONS)
    store(tmp_path / "local", **OPTIONS)
    assert remote_files() == files(tmp_path / "local")
    stored, local = StoredOutputs(Augmented(), address), StoredOutputs(Augmented(), tmp_path / "local")
    loader = DataLoader(stored, batch_size=16, sampler=Views(stored), num_workers=workers)
    for batch, keys in zip(loader, torch.utils.data.BatchSampler(Views(stored), 16, False), strict=True):
        expected = local.outputs(keys)["logits"]
        assert torch.equal(batch.teacher["logits"], expected)


def test_a_file_address_is_the_folder(tmp_path) -> None:
    store(f"file://{tmp_path}/one", **OPTIONS)
    store(tmp_path / "two", **OPTIONS)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(StoredOutputs(Augmented(), f"local://{tmp_path}/one")) == 50


def test_writing_goes_on_where_it_was_cut_off(address, tmp_path) -> None:
    class Cut(Augmented):
        left = 150  # a shard and a half, and the samples that are looked at first

        def __getitem__(self, index):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        store_outputs(good_teacher(), Cut(), address, batch_size=16, commit_seconds=0, **OPTIONS)
    assert 2 <= len(remote_files()) < 5
    store(address, **OPTIONS)
    store(tmp_path / "whole", **OPTIONS)
    assert remote_files() == files(tmp_path / "whole")


def test_a_changed_file_is_found_when_it_is_downloaded(address) -> None:
    store(address, **OPTIONS)
    memory = fsspec.filesystem("memory")
    name = "/outputs/shards/000001.logits.npy"
    content = memory.cat_file(name)
    memory.pipe_file(name, content[:-1] + bytes([content[-1] ^ 1]))
    stored = StoredOutputs(Augmented(), address)
    stored[View(3, 0)]
    with pytest.raises(ValueError, match=r"000001\.logits\.npy in memory://outputs does not have the checksum"):
        stored[View(45, 0)]
    with pytest.raises(ValueError, match="1 files of memory://outputs are damaged"):
        verify(address)
    memory.rm(name)
    with pytest.raises(ValueError, match=r"000001\.logits\.npy is missing in memory://outputs"):
        stored[View(45, 0)]
    store(address, **OPTIONS)
    assert len(verify(address).shards) == 3


def test_what_was_downloaded_is_not_downloaded_again(address) -> None:
    store(address, **OPTIONS)
    StoredOutputs(Augmented(), address)[View(0, 0)]
    (kept,) = Store(address).local.rglob("000000.logits.npy")
    written = kept.stat().st_mtime_ns
    StoredOutputs(Augmented(), address)[View(1, 0)]
    assert kept.stat().st_mtime_ns == written


def test_outputs_that_were_written_anew_are_not_read_from_the_old_copies(address, tmp_path) -> None:
    store(address, **OPTIONS)
    StoredOutputs(Augmented(), address, cache=tmp_path / "another machine")[View(0, 0)]
    fsspec.filesystem("memory").rm("/outputs", recursive=True)
    store(address, seed=1, **OPTIONS)
    sample = StoredOutputs(Augmented(), address, cache=tmp_path / "another machine")[View(0, 0)]
    with torch.no_grad():
        exact = good_teacher().eval()(sample.batch[0][None])[0]
    torch.testing.assert_close(sample.teacher["logits"], exact, atol=0.05, rtol=0)
