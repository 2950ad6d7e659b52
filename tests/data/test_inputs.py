"""Data sets as MLflow shows them: what is the same has the same digest, split by split."""

from lightning.pytorch import LightningDataModule

from kd_lightning.data import FashionMNIST
from kd_lightning.data.contract import Data, make_data
from kd_lightning.data.inputs import inputs_of
from tests.tiny import loader


def described(role: str, **options) -> dict[str, dict]:
    data = make_data(lambda role, seed: FashionMNIST(role=role, seed=seed, **options), role=role, seed=0)
    return {split["context"]: split for split in inputs_of(data, {"folder": "/images"})}


def test_each_role_has_its_own_training_samples_and_the_same_others() -> None:
    options = {"teacher_images": 90, "labelled": 30, "unlabelled": 20}
    teacher, student, distilled = (described(role, **options) for role in ("teacher", "student", "distilled"))
    assert list(teacher) == list(student) == ["training", "validation", "test"]
    assert [split["rows"] for split in distilled.values()] == [30, 1000, 2500, 20]
    assert distilled["unlabelled"]["digest"] not in {split["digest"] for split in student.values()}
    for context in ("validation", "test"):
        assert teacher[context] == student[context] == distilled[context]
    assert student["training"] == distilled["training"] != teacher["training"]
    assert {(split["name"], split["folder"]) for split in teacher.values()} == {("FashionMNIST", "/images")}


class Plain(LightningDataModule):
    def train_dataloader(self):
        return loader(32)

    def val_dataloader(self):
        return loader(16)

    test_dataloader = val_dataloader


def test_a_module_that_says_nothing_is_told_apart_by_its_configuration() -> None:
    one, other, same = (inputs_of(Data(Plain()), {"size": size}) for size in (1, 2, 1))
    assert one == same
    assert [(split["name"], split["context"], split["rows"]) for split in one] == [
        ("Plain", "training", 32),
        ("Plain", "validation", 16),
        ("Plain", "test", 16),
    ]
    digests = [split["digest"] for split in (*one, *other)]
    assert len(set(digests)) == 6
