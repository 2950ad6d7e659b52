"""Several processes write what one would have written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_lightning.stored_outputs import StoredOutputs, verify
from tests.stored_outputs.data import Augmented, files, store

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, sys, torch
from tests.stored_outputs.data import store

torch.distributed.init_process_group("gloo")
assert store(sys.argv[1], views=3).complete
torch.distributed.destroy_process_group()
"""


@pytest.mark.integration
def test_two_gloo_processes_write_half_of_the_shards_each(tmp_path) -> None:
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 20_000)},
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "outputs")]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    manifest = verify(tmp_path / "outputs")
    assert manifest.count == 2
    store(tmp_path / "alone", views=3, shard_bytes=manifest.rows_per_shard * manifest.bytes_per_view)
    assert files(tmp_path / "outputs") == files(tmp_path / "alone")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_one_after_the_other(tmp_path, order: tuple[int, ...]) -> None:
    manifests = [store(tmp_path, views=2, rank=rank, world_size=3) for rank in order]
    assert [manifest.complete for manifest in manifests] == [False, False, True]
    assert manifests[-1].count == 3
    assert len(StoredOutputs(Augmented(), tmp_path)) == 50


def test_another_number_of_ranks_goes_on_with_the_shards_of_the_first(tmp_path) -> None:
    store(tmp_path / "outputs", rank=1, world_size=4)
    assert store(tmp_path / "outputs").complete
    store(tmp_path / "whole", shard_bytes=13 * 12)
    assert files(tmp_path / "outputs") == files(tmp_path / "whole")


def test_a_rank_outside_of_the_world(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected rank 0 to 1, got 2"):
        store(tmp_path, rank=2, world_size=2)
    with pytest.raises(ValueError, match="expected rank and world_size together"):
        store(tmp_path, rank=0)
