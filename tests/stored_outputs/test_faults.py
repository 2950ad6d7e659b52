"""Whatever happens to the files or to the one who writes them: an error that names it, never a wrong pairing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from kd_lightning.data.in_memory import CropAndFlip
from kd_lightning.durable_files import seal, unseal
from kd_lightning.stored_outputs import StoredOutputs, Views, shards, store_outputs, verify
from kd_lightning.stored_outputs.layout import read_manifest
from kd_lightning.stored_outputs.shards import ShardWriter
from kd_lightning.stored_outputs.store import Store, file_checksum
from tests.stored_outputs.data import ROWS_OF_A_SHARD, Augmented, Jitter, files, store
from tests.stored_outputs.test_replay import images
from tests.tiny import good_teacher, network

ROOT = Path(__file__).parents[2]


def in_a_process(script: str, *arguments: object) -> str:
    """Run a script that may fork: in a process without threads."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, timeout=180, env=environment, stdout=subprocess.PIPE, text=True).stdout


KILLED = """
import os, pathlib, shutil, signal, sys
from kd_lightning.stored_outputs import shards
from tests.stored_outputs.data import ROWS_OF_A_SHARD, files, store

folder = pathlib.Path(sys.argv[1])
options = {"views": 2, "layers": ["stem"], "shard_bytes": 40 * 44}
store(folder / "whole", **options)
whole = files(folder / "whole")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killed_at(point, path, **more):
    calls = 0
    def counted(function, before):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == point:
                if before is not None:
                    before(*args)
                die()
            return function(*args, **kwargs)
        return call
    child = os.fork()
    if child == 0:
        half = lambda file, content: file.write(content[: len(content) // 2])
        shards._write = counted(shards._write, half)
        for name in ("fsync", "replace", "link", "unlink"):
            setattr(os, name, counted(getattr(os, name), None))
        store(path, **options, **more)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

killed = 0
for commit_seconds, point in ((0.0, 1), (1e9, 2)):
    while True:
        path = folder / f"{commit_seconds}-{point}"
        if not killed_at(point, path, commit_seconds=commit_seconds):
            break
        killed += 1
        if point % 2 == 0:
            killed_at(4, path, commit_seconds=commit_seconds)  # and once more, a little later
        store(path, **options)
        left = files(path)
        assert left == whole, (commit_seconds, point, sorted(left), sorted(whole))
        shutil.rmtree(path)
        point += 4
print(killed)
"""


def test_killed_at_any_point_and_resumed_gives_the_same_bytes(tmp_path) -> None:
    killed = int(in_a_process(KILLED, tmp_path))
    assert killed > 15  # writes, syncs, renamings and removals of three shards


DISK_FULL = """
import pathlib, resource, sys
from tests.stored_outputs.data import Augmented, files, store

folder = pathlib.Path(sys.argv[1])
dataset = Augmented(5000)
store(folder / "whole", dataset)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, most))
try:
    store(folder / "outputs", dataset, commit_seconds=0.0)
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert not list((folder / "outputs" / "shards").glob("*.npy"))
store(folder / "outputs", dataset)
assert files(folder / "outputs") == files(folder / "whole")
"""


def test_a_full_disk_is_named_and_what_was_written_is_kept(tmp_path) -> None:
    said = in_a_process(DISK_FULL, tmp_path)
    assert "while writing shard 0" in said
    assert "2,480 of 5,000 views; make room and call store_outputs again" in said


def test_too_little_space_is_known_before_the_first_batch(tmp_path, monkeypatch) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:4], 0, *real[5:])))
    with pytest.raises(OSError, match=r"needs 0\.00 GB for 50 views and has 0\.00 GB free: make room"):
        store(tmp_path / "outputs")
    assert not list(tmp_path.rglob("*.npy*"))


@pytest.fixture
def outputs(tmp_path) -> Path:
    store(tmp_path / "outputs", **ROWS_OF_A_SHARD)
    return tmp_path / "outputs"


def shard(outputs: Path) -> Path:
    return outputs / "shards" / "000001.logits.npy"


def tear(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)


def rename_array(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b"(10, 12)", b"(12, 10)"))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def swap(file: Path) -> None:
    """With another shard's file of the same kind, which has the same length."""
    file.write_bytes(file.with_name(file.name.replace("000000", "000002").replace("000001", "000000")).read_bytes())


@pytest.fixture
def three_shards(tmp_path) -> Path:
    store(tmp_path / "outputs", views=2, shard_bytes=40 * 12)
    return tmp_path / "outputs"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (tear, r"is torn: expected 608 bytes, got 603"),
        (empty, r"is torn: expected 608 bytes, got 0"),
        (Path.unlink, "is missing"),
        (flip, "has other bytes than were written, by its checksum"),
        (swap, "has other bytes than were written, by its checksum"),
    ],
)
def test_a_damaged_shard_is_named_when_it_is_opened_and_writing_again_repairs_it(
    three_shards, capsys, damage, text: str
) -> None:
    before = files(three_shards)
    damage(shard(three_shards))
    for look in (lambda: StoredOutputs(Augmented(), three_shards), lambda: verify(three_shards)):
        with pytest.raises(ValueError, match=rf"1 files of .* are damaged: .*000001\.logits\.npy.*{text}.*again"):
            look()
    store_outputs(good_teacher(), Augmented(), three_shards, views=2, shard_bytes=40 * 12, batch_size=16)
    assert re.search(rf"000001\.logits\.npy in .* {text}: written anew", capsys.readouterr().out)
    assert files(three_shards) == before
    assert len(StoredOutputs(Augmented(), three_shards)) == 50


def test_every_flipped_bit_of_a_shard_is_found(outputs) -> None:
    whole = shard(outputs).read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        shard(outputs).write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match="are damaged"):
            verify(outputs)


@pytest.mark.parametrize("damage", [tear, Path.unlink, flip, empty, swap])
def test_a_damaged_record_of_a_shard_is_no_record(three_shards, capsys, damage) -> None:
    before = files(three_shards)
    damage(three_shards / "shards" / "000001.json")
    assert len(StoredOutputs(Augmented(), three_shards)) == 50  # reads the manifest alone
    store_outputs(good_teacher(), Augmented(), three_shards, views=2, shard_bytes=40 * 12, batch_size=16)
    assert ("written anew" in capsys.readouterr().out) == (damage is not Path.unlink)
    assert files(three_shards) == before


def test_a_damaged_note_of_how_far_a_writer_came_is_none(tmp_path) -> None:
    store(tmp_path / "whole")
    path = tmp_path / "outputs"
    (path / "shards").mkdir(parents=True)
    (path / "shards" / "000000.progress").write_bytes(b"{\xff")
    store(path)
    assert files(path) == files(tmp_path / "whole")


def test_a_check_may_be_left_out_and_is_made_once_a_process(outputs, monkeypatch) -> None:
    flip(shard(outputs))
    assert len(StoredOutputs(Augmented(), outputs, verify=False)) == 50
    with pytest.raises(ValueError, match="are damaged"):
        StoredOutputs(Augmented(), outputs)
    store(outputs, **ROWS_OF_A_SHARD)
    read = []
    monkeypatch.setattr(shards, "file_checksum", lambda path: read.append(path.name) or file_checksum(path))
    assert len(StoredOutputs(Augmented(), outputs)) == 50
    assert len(StoredOutputs(Augmented(), outputs)) == 50
    assert read == ["000001.logits.npy"]  # the other was read as it was when the rest was repaired


def test_a_file_with_another_header_is_refused_when_it_is_read(outputs) -> None:
    rename_array(shard(outputs))
    stored = StoredOutputs(Augmented(), outputs, verify=False)
    with pytest.raises(ValueError, match=r"holds \(12, 10\), expected \(10, 12\): call verify"):
        stored[45]


def test_a_damaged_beginning_is_written_anew(tmp_path) -> None:
    store(tmp_path / "whole")
    store(tmp_path / "outputs", Augmented())
    manifest = read_manifest(Store(tmp_path / "outputs"))
    for file in (tmp_path / "outputs" / "shards").iterdir():
        file.unlink()
    with ShardWriter(Store(tmp_path / "outputs"), manifest, 0) as writer:
        writer.append({"logits": torch.full((16, 12), 7, dtype=torch.uint8).numpy()})
        writer.commit()
    flip(tmp_path / "outputs" / "shards" / "000000.logits.npy.partial")
    store(tmp_path / "outputs")
    assert files(tmp_path / "outputs") == files(tmp_path / "whole")


def test_the_seconds_of_all_attempts_are_noted(tmp_path) -> None:
    first = store(tmp_path / "outputs")
    assert first.seconds > 0
    (tmp_path / "outputs" / "shards" / "000000.json").unlink()
    with ShardWriter(Store(tmp_path / "outputs"), first, 0) as writer:
        writer.append({"logits": torch.zeros(16, 12, dtype=torch.uint8).numpy()})
        time.sleep(0.3)
        writer.commit()
    again = store(tmp_path / "outputs")
    assert again.seconds >= 0.3
    assert store(tmp_path / "outputs") == verify(tmp_path / "outputs") == again, "what is there is not written again"


def test_two_writers_of_one_shard(outputs) -> None:
    shard(outputs).unlink()
    with (
        ShardWriter(Store(outputs), read_manifest(Store(outputs)), 1),
        pytest.raises(RuntimeError, match=r"another process is writing shard 1 of .*, expected one writer a shard"),
    ):
        store(outputs)


TWO = """
import os, sys, time
from tests.stored_outputs.data import Augmented, Jitter, store

class Slow(Jitter):
    def __call__(self, x):
        time.sleep(0.02)
        return super().__call__(x)

Slow.__qualname__ = "Jitter"
ready, go = os.pipe()
child = os.fork()
if child == 0:
    class Told(Augmented):
        def __getitem__(self, index):
            if index == 20:
                os.write(go, b"x")
            return super().__getitem__(index)
    store(sys.argv[1], Told(transform=Slow()))
    os._exit(0)
os.read(ready, 1)
time.sleep(1.0)
try:
    store(sys.argv[1], Augmented(transform=Slow()))
except RuntimeError as error:
    print(error)
print("ended with", os.waitpid(child, 0)[1])
"""


def test_a_second_process_is_told_that_another_one_writes(tmp_path) -> None:
    said = in_a_process(TWO.replace("0.02", "0.05"), tmp_path / "outputs")
    assert "another process is writing shard 0" in said
    assert "ended with 0" in said
    assert len(StoredOutputs(Augmented(transform=Jitter()), tmp_path / "outputs")) == 50


class Renamed(Jitter):
    pass


def differing() -> dict:
    other_inputs = Augmented()
    other_inputs.inputs = other_inputs.inputs.flip(0)
    other_labels = Augmented()
    other_labels.labels = other_labels.labels.flip(0)
    return {
        "shrank": (Augmented(49), "length: stored 50, now 49"),
        "transform": (
            Augmented(transform=Jitter(0.2)),
            r"transform: stored \['Jitter\(scale=0.1\)'\], now .*scale=0.2",
        ),
        "transform by name": (Augmented(transform=Renamed()), r"transform: .*now \['Renamed\(scale=0.1\)'\]"),
        "inputs": (other_inputs, r"of something else: samples: 16 of 16 that were looked at, such as sample 0 view 0"),
        "labels": (other_labels, r"targets: \d+ of 16 that were looked at"),
    }


@pytest.mark.parametrize("what", list(differing()))
def test_another_data_set_or_transform_is_named(outputs, what: str) -> None:
    dataset, text = differing()[what]
    with pytest.raises(ValueError, match=text):
        StoredOutputs(dataset, outputs)
    before = files(outputs)
    with pytest.raises(ValueError, match=text):
        store(outputs, dataset)
    assert files(outputs) == before


def test_another_teacher_is_named(outputs) -> None:
    with pytest.raises(ValueError, match=r"teacher: stored \w+, now \w+ \(pass the teacher that wrote them\)"):
        store(outputs, teacher=network(5, width=16))
    with pytest.raises(ValueError, match="teacher: stored"):
        StoredOutputs(Augmented(), outputs, teacher=network(5, width=16))
    assert len(StoredOutputs(Augmented(), outputs, teacher=good_teacher())) == 50


def test_a_teacher_that_was_trained_on_is_another(outputs) -> None:
    teacher = good_teacher()
    teacher.norm.running_mean[0] += 0.01
    with pytest.raises(ValueError, match="teacher: stored"):
        StoredOutputs(Augmented(), outputs, teacher=teacher)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"views": 2}, "views: stored 1, now 2"),
        ({"seed": 1}, "seed: stored 0, now 1"),
        ({"format": "float16"}, "format: stored uint8, now float16"),
        ({"layers": ["stem"]}, r"layers: stored \[\], now \['stem'\]"),
    ],
)
def test_other_settings_are_named(outputs, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"{text}.*or take another folder"):
        store(outputs, **options)


def test_the_seed_of_a_data_set_that_augments_by_itself_counts(tmp_path) -> None:
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    store(tmp_path, images(), teacher, views=2)
    with pytest.raises(ValueError, match=r"transform: stored \['CropAndFlip.*seed=0\)'\], now \['CropAndFlip.*seed=1"):
        StoredOutputs(images(seed=1), tmp_path)
    other = images()
    other.augment = CropAndFlip(12, 0, padding=2)
    other.images = other.images.flip(0)
    with pytest.raises(ValueError, match=r"samples: \d+ of 24 that were looked at"):
        StoredOutputs(other, tmp_path)


def test_another_machines_rounding_is_no_difference(outputs) -> None:
    rounded = Augmented()
    rounded.inputs = rounded.inputs * (1 + 1e-6)
    assert len(StoredOutputs(rounded, outputs)) == 50


def test_outputs_that_are_not_complete_or_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json, expected stored outputs: call store_outputs first"):
        StoredOutputs(Augmented(), tmp_path)
    manifest = store(tmp_path, rank=0, world_size=2)
    assert not manifest.complete
    with pytest.raises(ValueError, match="are not complete, expected 2 shards: call store_outputs again"):
        StoredOutputs(Augmented(), tmp_path)


def test_a_manifest_that_cannot_be_read(outputs) -> None:
    file = outputs / "manifest.json"
    file.write_text(json.dumps({"of": "another program"}))
    for use in (lambda: store(outputs), lambda: StoredOutputs(Augmented(), outputs)):
        with pytest.raises(ValueError, match=r"cannot be read \(.*foreign file\), expected one of this version"):
            use()
    assert file.read_text() == json.dumps({"of": "another program"})


def edit(file: Path) -> None:
    content = json.loads(file.read_text())
    content["samples"] += 1
    content["shards"].pop()
    file.write_text(json.dumps(content))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


@pytest.mark.parametrize("damage", [edit, cut, empty, flip, lambda file: file.write_bytes(b"\xff" * 99)])
def test_a_damaged_or_edited_manifest_is_named_and_writing_again_repairs_it(outputs, capsys, damage) -> None:
    before = files(outputs)
    damage(outputs / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json in .* cannot be read .*: call store_outputs again"):
        StoredOutputs(Augmented(), outputs)
    store_outputs(good_teacher(), Augmented(), outputs, batch_size=16, **ROWS_OF_A_SHARD)
    assert "manifest.json in" in capsys.readouterr().out
    assert files(outputs) == before


def test_without_their_manifest_outputs_of_another_teacher_are_written_over(outputs) -> None:
    (outputs / "manifest.json").write_bytes(b"")
    teacher = network(5, width=16)
    store(outputs, teacher=teacher, **ROWS_OF_A_SHARD)
    store(outputs.parent / "whole", teacher=teacher, **ROWS_OF_A_SHARD)
    assert files(outputs) == files(outputs.parent / "whole")


def test_outputs_in_the_layout_of_another_version(outputs) -> None:
    file = outputs / "manifest.json"
    manifest = unseal(file.read_text())
    manifest["fingerprint"]["code"] = 1
    file.write_text(seal(manifest))
    for use in (lambda: StoredOutputs(Augmented(), outputs), lambda: store(outputs)):
        with pytest.raises(ValueError, match=r"code: stored 1, now 3 \(another version .*: write them again\)"):
            use()


class Broken(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, torch.nn.Linear(6, 4)

    def forward(self, x):
        logits = self.head(x)
        if self.kind == "probabilities":
            return logits.softmax(-1)
        return logits.index_fill(0, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("probabilities", "expected logits from the teacher, got probabilities"),
        ("nan", r"hold NaN .* for samples \[3\]"),
    ],
)
def test_a_teacher_that_gives_no_logits(tmp_path, kind: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        store(tmp_path / "outputs", teacher=Broken(kind))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("options", [{"views": 0}, {"batch_size": 0}, {"dataset": Augmented(0)}])
def test_nothing_to_store(tmp_path, options: dict) -> None:
    with pytest.raises(ValueError, match="expected a view, a batch size and a sample or more"):
        store(tmp_path, **options)


def test_a_worker_that_dies_leaves_what_is_whole(tmp_path) -> None:
    class Dies(Augmented):
        armed = True

        def __getitem__(self, index):
            if index == 45 and self.armed and torch.utils.data.get_worker_info():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    store(tmp_path / "whole", Augmented(), **ROWS_OF_A_SHARD)
    with pytest.raises(RuntimeError, match="worker"):
        store(tmp_path / "outputs", Dies(), num_workers=1, **ROWS_OF_A_SHARD)
    assert (tmp_path / "outputs" / "shards" / "000000.json").exists()
    store(tmp_path / "outputs", Augmented())
    assert files(tmp_path / "outputs") == files(tmp_path / "whole")
    stored = StoredOutputs(Augmented(), tmp_path / "outputs")
    assert len(list(DataLoader(stored, 10, sampler=Views(stored)))) == 5
