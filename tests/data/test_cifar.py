"""Tiny sets in the publisher's format, read by the real reader."""

import gzip
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.data import CIFAR10, CIFAR100
from tests.data.serving import publisher

KINDS = (CIFAR10, CIFAR100)
TRAIN, TEST = 50, 12


def images_and_labels(kind: type, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(256, size=(count, 3, 32, 32), dtype=np.uint8), random.integers(kind.num_classes, size=count)


def archive(kind: type, **replaced: bytes) -> bytes:
    """Write the publisher's archive: records of label bytes and then red, green and blue, row by row."""
    contents: dict[str, bytes] = {kind.names_member: "\n".join(names(kind)).encode() + b"\n\n"}
    for members, count, seed in ((kind.train_members, TRAIN, 0), (kind.test_members, TEST, 1)):
        images, labels = images_and_labels(kind, count, seed)
        records = b""
        for image, label in zip(images, labels, strict=True):
            group = b"\x13" if kind is CIFAR100 else b""
            records += group + bytes([label]) + image.tobytes()
        size = len(records) // len(members)
        contents |= {name: records[i * size : (i + 1) * size] for i, name in enumerate(members)}
    contents |= replaced
    written = io.BytesIO()
    # Without the time, which would make the same content another file a second later.
    with gzip.GzipFile(fileobj=written, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{kind.prefix}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return written.getvalue()


def names(kind: type) -> list[str]:
    return [f"class_{i}" for i in range(kind.num_classes)]


def published(kind: type, content: bytes, address: str = "http://127.0.0.1:9/") -> type:
    return type(kind.__name__, (kind,), {"md5": hashlib.md5(content).hexdigest(), "publisher": address})


def small(kind: type, folder: Path, **options: object):
    content = archive(kind)
    (folder / kind.archive).write_bytes(content)
    return published(kind, content)(folder=folder, **{"validation": 10, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_images_labels_and_names_are_those_in_the_archive(kind: type, tmp_path: Path):
    data = small(kind, tmp_path, augment=False)
    assert data.counts == {"train": 40, "validation": 10, "test": 12}
    images, labels = images_and_labels(kind, TEST, 1)
    batch, target = next(iter(data.test_dataloader()))
    mean, std = (np.array(x)[:, None, None] for x in (data.mean, data.std))
    np.testing.assert_allclose(batch, (images / 255 - mean) / std, atol=1e-5)
    assert target.tolist() == labels.tolist()
    assert list(data.class_names) == names(kind)
    images, labels = images_and_labels(kind, TRAIN, 0)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    found = {}
    for name in ("train", "validation"):
        subset = data.subset(name)
        found |= {i.numpy().tobytes(): int(t) for i, t in zip(subset.images, subset.target, strict=True)}
    assert found == known  # every training image is in one of the two, with its label


def test_validation_is_drawn_by_the_split_seed_alone(tmp_path: Path):
    def validation(**options: object) -> torch.Tensor:
        return small(CIFAR100, tmp_path, **options).subset("validation").images

    assert torch.equal(validation(), validation(seed=1, role="teacher"))
    assert not torch.equal(validation(), validation(split_seed=1))


def test_every_role_sees_all_training_images(tmp_path: Path):
    for role in ("teacher", "student", "control", "distilled"):
        target = torch.cat([target for _, target in small(CIFAR10, tmp_path, role=role).train_dataloader()])
        assert len(target) == 40
        assert (target >= 0).all()


def test_only_training_images_are_augmented(tmp_path: Path):
    data, plain = small(CIFAR10, tmp_path), small(CIFAR10, tmp_path, augment=False)

    def batches(loader) -> torch.Tensor:
        return torch.cat([images for images, _ in loader])

    assert (batches(data.train_dataloader()) != batches(plain.train_dataloader())).flatten(1).any(1).sum() > 30
    assert torch.equal(batches(data.val_dataloader()), batches(plain.val_dataloader()))
    assert torch.equal(batches(data.test_dataloader()), batches(plain.test_dataloader()))


def test_another_seed_augments_otherwise_and_the_fingerprint_does_not_mind(tmp_path: Path):
    one, other = (small(CIFAR10, tmp_path, seed=seed) for seed in (0, 1))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() == small(CIFAR10, tmp_path, batch_size=8, role="teacher").fingerprint()
    assert one.fingerprint() != small(CIFAR10, tmp_path, split_seed=1).fingerprint()
    assert one.fingerprint() != small(CIFAR10, tmp_path, augment=False).fingerprint()
    augmented = [data.subset("train").augment(data.subset("train").images, range(40), 0) for data in (one, other)]
    assert not torch.equal(*augmented)


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_or_foreign_archive_is_named(kind: type, tmp_path: Path):
    content, file = archive(kind), tmp_path / kind.archive
    for wrong in (b"", b"abc", content[:-100]):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"{kind.archive} has the md5 .{{12}}…, expected .{{12}}…: it is torn or"):
            published(kind, content)(folder=tmp_path).setup()
    with pytest.raises(ValueError, match=rf"{kind.archive} has the md5"):
        kind(folder=tmp_path).prepare_data()


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_of_the_right_checksum_that_cannot_be_read_is_named(kind: type, tmp_path: Path):
    whole = archive(kind)
    last = 1 + 32 * 32 * 3
    cases = {
        "torn or another file": (
            b"",
            b"abc",
            whole[: len(whole) // 2],
            archive(kind, **{kind.test_members[0]: b"odd"}),
        ),
        f"has a class {kind.num_classes}": (
            archive(kind, **{kind.test_members[0]: bytes([kind.num_classes] * kind.label_bytes) + bytes(last - 1)}),
        ),
    }
    for message, contents in cases.items():
        for content in contents:
            (tmp_path / kind.archive).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{kind.archive} (is |){message}"):
                published(kind, content)(folder=tmp_path, validation=10).setup()


def test_no_file_of_the_archive_is_unpickled(tmp_path: Path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    content = archive(CIFAR10, **{CIFAR10.test_members[0]: pickle.dumps(Harmful())})
    (tmp_path / CIFAR10.archive).write_bytes(content)
    with pytest.raises(ValueError, match="torn or another file"):
        published(CIFAR10, content)(folder=tmp_path, validation=10).setup()
    assert not (tmp_path / "harmed").exists()


def test_it_is_downloaded_only_when_asked_for_and_only_once(tmp_path: Path):
    content = archive(CIFAR100)
    with publisher({CIFAR100.archive: content}) as address:
        kind = published(CIFAR100, content, address)
        with pytest.raises(ValueError, match=r"cifar-100-binary\.tar\.gz is missing: pass download=True"):
            kind(folder=tmp_path).setup()
        kind(folder=tmp_path, download=True).prepare_data()
    assert kind(folder=tmp_path, download=True, validation=10).counts["train"] == 40
    (tmp_path / CIFAR100.archive).unlink()
    with pytest.raises(OSError, match=r"cannot be had .*refused.*: put it into"):
        kind(folder=tmp_path, download=True).prepare_data()


def test_more_validation_images_than_there_are_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected up to 50 images, got 51 \+ 0: keep fewer for validation"):
        small(CIFAR10, tmp_path, validation=51).setup()
