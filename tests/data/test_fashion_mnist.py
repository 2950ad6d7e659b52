import gzip
import hashlib
import struct
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.data import FashionMNIST
from kd_lightning.data.fashion_mnist_files import PACKAGED, read_packaged
from tests.data.serving import publisher

ARRAYS = read_packaged()


def seen(data: FashionMNIST) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.train_dataloader())
    return torch.cat([images for images, _ in batches]), torch.cat([target for _, target in batches])


def rows(images: torch.Tensor) -> list[bytes]:
    return [image.tobytes() for image in images.numpy()]


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation."""
    return (images * 0.3530 + 0.2860).mul(255).round().to(torch.uint8)


def labels_of(images: torch.Tensor) -> list[int]:
    """True labels, found by the pixels."""
    known = dict(zip(rows(torch.tensor(ARRAYS["train_images"])), ARRAYS["train_labels"].tolist(), strict=True))
    return [known[row] for row in rows(images)]


def test_no_image_is_in_two_subsets():
    data = FashionMNIST(teacher_images=6000, labelled=500, unlabelled=5500)
    subsets = [set(rows(data.subset(name).images)) for name in data.counts]
    assert all(one.isdisjoint(other) for one, other in combinations(subsets, 2))
    assert [len(subset) for subset in subsets] == list(data.counts.values())


def test_counts_are_those_asked_for():
    data = FashionMNIST(teacher_images=100, labelled=20, unlabelled=30)
    assert data.counts == {"teacher": 100, "labelled": 20, "unlabelled": 30, "validation": 1000, "test": 2500}


def test_the_teacher_trains_on_the_first_images():
    images, target = seen(FashionMNIST(teacher_images=128, role="teacher"))
    assert sorted(rows(pixels(images))) == sorted(rows(torch.tensor(ARRAYS["train_images"][:128])))
    assert sorted(target.tolist()) == sorted(ARRAYS["train_labels"][:128].tolist())


def test_images_and_their_labels_stay_together():
    images, target = seen(FashionMNIST(labelled=300))
    assert (images.shape, images.dtype, target.dtype) == ((300, 1, 28, 28), torch.float32, torch.int64)
    assert target.tolist() == labels_of(pixels(images))


@pytest.mark.parametrize(
    ("role", "labelled", "unlabelled"), [("student", 40, 0), ("control", 40, 60), ("distilled", 40, 60)]
)
def test_only_the_teachers_pupils_see_unlabelled_images(role: str, labelled: int, unlabelled: int):
    _, target = seen(FashionMNIST(labelled=40, unlabelled=60, role=role))
    assert (target != -100).sum() == labelled
    assert (target == -100).sum() == unlabelled


def test_control_and_distilled_see_the_same_order():
    control, distilled = (seen(FashionMNIST(unlabelled=60, role=role, seed=4)) for role in ("control", "distilled"))
    torch.testing.assert_close(control, distilled, rtol=0, atol=0)


def test_the_draw_is_that_of_the_split_seed_and_not_of_the_seed():
    drawn = [set(rows(seen(FashionMNIST(labelled=50, **seeds))[0])) for seeds in ({}, {"seed": 1}, {"split_seed": 1})]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_more_labelled_images_hold_the_fewer():
    few, many = (set(rows(FashionMNIST(labelled=count).subset("labelled").images)) for count in (50, 80))
    assert few < many


def test_a_class_is_left_out_of_the_students_images_only():
    data = FashionMNIST(labelled=2000, unlabelled=2000, exclude_classes=[9, 2])
    assert not {2, 9} & set(data.subset("labelled").target.tolist())
    assert not {2, 9} & set(labels_of(data.subset("unlabelled").images))
    for name in ("teacher", "validation", "test"):
        assert set(data.subset(name).target.tolist()) == set(range(10))


def test_teacher_and_student_can_share_all_images():
    data = FashionMNIST(teacher_images=200, labelled=200, share_images=True)
    assert set(rows(data.subset("labelled").images)) == set(rows(data.subset("teacher").images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled": 6001}, r"expected up to 6000 images, got 6001 \+ 0: ask for fewer .*whole=True"),
        ({"labelled": 6000, "unlabelled": 1}, r"expected up to 6000 images, got 6000 \+ 1"),
        ({"labelled": 5500, "exclude_classes": [9]}, "expected up to 5373 images, got 5500"),
        ({"labelled": -1}, "expected labelled of 0 or more, got -1"),
        ({"teacher_images": 12001}, r"expected teacher_images up to 12000, got 12001: ask for fewer, or .*whole=True"),
        ({"labelled": 201, "teacher_images": 200, "share_images": True}, "expected up to 200 images, got 201"),
        ({"exclude_classes": [10]}, r"expected exclude_classes among 0 to 9, got \[10\]"),
        ({"role": "pupil"}, "expected role to be one of teacher, student, control, distilled, got 'pupil'"),
        ({"batch_size": 0}, "expected batch_size of 1 or more, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_training(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FashionMNIST(**options).setup()


def test_a_role_without_images_is_refused():
    data = FashionMNIST(labelled=0, unlabelled=10, role="student")
    with pytest.raises(ValueError, match="expected samples for the role student, got none"):
        data.train_dataloader()


def test_evaluation_is_in_the_files_order():
    data = FashionMNIST()
    target = torch.cat([target for _, target in data.val_dataloader()])
    assert target.tolist() == ARRAYS["val_labels"].tolist()
    target = torch.cat([target for _, target in data.test_dataloader()])
    assert target.tolist() == ARRAYS["test_labels"].tolist()


def test_mean_and_deviation_are_those_of_the_images():
    images, _ = seen(FashionMNIST(role="teacher"))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_the_fingerprint_changes_with_what_is_seen_and_with_nothing_else():
    def of(**options: object) -> str:
        return FashionMNIST(**options).fingerprint()

    assert of() == of(seed=1, batch_size=32, eval_batch_size=10)
    others = [{"labelled": 299}, {"unlabelled": 1}, {"split_seed": 1}, {"exclude_classes": [3]}, {"role": "teacher"}]
    assert len({of(), *(of(**other) for other in others)}) == 6
    assert of(role="teacher") == of(role="teacher", labelled=200, unlabelled=10, split_seed=1)
    assert of(role="student") == of(role="student", unlabelled=10)


def test_a_torn_or_foreign_packaged_file_is_named(tmp_path: Path):
    file = tmp_path / "images.npz"
    content = PACKAGED.read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes(16) + content[middle + 16 :]
    for wrong in (b"", b"no zip", content[:middle], altered):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"images\.npz is torn or another file .*expected train_images"):
            read_packaged(file)
    np.savez(file, train_images=np.zeros(3))
    with pytest.raises(ValueError, match=r"images\.npz is torn or another file"):
        read_packaged(file)
    np.savez(file, **{name: np.array([{}]) for name in ARRAYS})  # needs a pickle to be read
    with pytest.raises(ValueError, match=r"images\.npz is torn or another file .*allow_pickle"):
        read_packaged(file)


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes())


def small_set() -> dict[str, bytes]:
    """1,100 + 50 images in the publisher's format."""
    return dict(
        zip(
            FashionMNIST.sha256,
            (
                idx(ARRAYS[f"{split}_{what}"][:count])
                for split, count in (("train", 1100), ("test", 50))
                for what in ("images", "labels")
            ),
            strict=True,
        )
    )


def whole(
    files: dict[str, bytes], address: str = "http://127.0.0.1:9/", debian: Path = Path("nowhere")
) -> type[FashionMNIST]:
    """Make the data module of a publisher who published these files."""

    class Small(FashionMNIST):
        publisher = address

    Small.sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    Small.debian = debian
    return Small


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kd-lightning" / "fashion-mnist"


def test_the_whole_set_is_read_from_the_folder_that_is_named(tmp_path: Path):
    files = small_set()
    data = whole(files)(folder=write(tmp_path / "here", files), teacher_images=60, labelled=30, unlabelled=10)
    assert data.counts == {"teacher": 60, "labelled": 30, "unlabelled": 10, "validation": 1000, "test": 50}
    assert np.array_equal(data.subset("validation").images[:, 0], ARRAYS["train_images"][100:1100])
    assert np.array_equal(data.subset("test").target, ARRAYS["test_labels"][:50])
    assert np.array_equal(data.subset("teacher").images[:, 0], ARRAYS["train_images"][:60])


def test_debians_folder_comes_before_the_cache_and_the_cache_before_the_download(tmp_path: Path, cache: Path):
    files = small_set()
    debian = write(tmp_path / "debian", files)
    write(cache, dict.fromkeys(files, b"torn"))
    options = {"whole": True, "teacher_images": 60, "labelled": 30}
    assert whole(files, debian=debian)(**options).counts["test"] == 50
    with pytest.raises(
        ValueError, match=r"cache.kd-lightning.fashion-mnist.train-images-idx3-ubyte\.gz has the sha256"
    ):
        whole(files)(**options).setup()
    write(cache, files)
    assert whole(files)(**options).counts["test"] == 50  # nobody answers at the address


def test_what_is_missing_is_downloaded_once(cache: Path):
    files = small_set()
    options = {"whole": True, "teacher_images": 60, "labelled": 30}
    with publisher(files) as address:
        data = whole(files, address)(**options)
        data.prepare_data()
        assert data.counts["test"] == 50
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == files
    assert whole(files, address)(**options).counts["test"] == 50


def test_a_download_that_is_cut_off_or_altered_leaves_nothing(cache: Path):
    files = small_set()
    name = next(iter(files))
    for served, cut_off in ((files, True), ({**files, name: b"altered"}, False), ({}, False)):
        with publisher(served, cut_off) as address, pytest.raises(OSError, match=f"{name} cannot be had .* Debian's"):
            whole(files, address)(whole=True).prepare_data()
        assert list(cache.iterdir()) == []
    with pytest.raises(OSError, match=r"cannot be had .*refused.*whole=False"):
        whole(files)(whole=True).prepare_data()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with publisher(small_set()) as address, pytest.raises(OSError, match=r"cannot be had .*put the file into"):
        whole(small_set(), address)(whole=True).prepare_data()


@pytest.mark.parametrize("name", FashionMNIST.sha256)
def test_another_checksum_is_an_error_that_names_the_file(tmp_path: Path, name: str):
    files = small_set()
    folder = write(tmp_path / "here", {**files, name: files[name][:-20]})
    with pytest.raises(ValueError, match=rf"here.{name} has the sha256 .{{12}}…, expected .{{12}}…: it is torn or"):
        whole(files)(folder=folder).setup()


def test_a_file_with_the_right_checksum_that_is_no_image_file_is_named(tmp_path: Path):
    name = next(iter(small_set()))
    for wrong in (b"", small_set()[name][:-20], gzip.compress(b"abc"), idx(ARRAYS["train_labels"])):
        files = {**small_set(), name: wrong}
        with pytest.raises(ValueError, match=rf"{name} is torn or another file .*the publisher's {name}"):
            whole(files)(folder=write(tmp_path / "here", files)).setup()
    name = "t10k-labels-idx1-ubyte.gz"
    files = {**small_set(), name: idx(ARRAYS["test_labels"][:49])}
    with pytest.raises(ValueError, match=f"{name} has 49 labels for 50 images"):
        whole(files)(folder=write(tmp_path / "here", files)).setup()


def test_a_folder_without_the_files_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks train-images-idx3-ubyte\.gz, .*expected the publisher's four files"):
        FashionMNIST(folder=tmp_path).prepare_data()


@pytest.mark.skipif(not FashionMNIST.debian.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_packaged_images_are_the_first_of_the_whole_set():
    data = FashionMNIST(whole=True, teacher_images=12_000)
    assert data.counts == {"teacher": 12_000, "labelled": 300, "unlabelled": 0, "validation": 1000, "test": 10_000}
    assert np.array_equal(data.subset("teacher").images[:, 0], ARRAYS["train_images"])
    assert np.array_equal(data.subset("test").images[:2500, 0], ARRAYS["test_images"])
