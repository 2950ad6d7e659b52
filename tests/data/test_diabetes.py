import numpy as np
import pytest
import torch

from kd_lightning.data import Diabetes


def rows(data: Diabetes, name: str) -> set[bytes]:
    return {row.numpy().tobytes() for row in data.subset(name).rows}


def test_every_patient_is_in_one_subset() -> None:
    data = Diabetes(teacher_patients=170, labelled=40, unlabelled=62)
    assert data.counts == {"teacher": 170, "labelled": 40, "unlabelled": 62, "validation": 50, "test": 120}
    assert sum(data.counts.values()) == 442
    assert len(set.union(*(rows(data, name) for name in data.counts))) == 442


def test_figures_and_target_are_scikit_learns_standardised() -> None:
    from sklearn.datasets import load_diabetes

    data = Diabetes(teacher_patients=272, labelled=0)
    x = torch.cat([data.subset(name).rows for name in ("teacher", "validation", "test")])
    y = torch.cat([data.subset(name).target for name in ("teacher", "validation", "test")])
    torch.testing.assert_close(x.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, unbiased=False), torch.ones(10), atol=1e-5, rtol=0)
    original = y * data.target_std + data.target_mean
    _, progression = load_diabetes(return_X_y=True)
    assert np.sort(original[:, 0].numpy()) == pytest.approx(np.sort(progression), abs=1e-3)
    assert abs(y.mean()) < 0.01
    assert abs(y.std() - 1) < 0.01


def test_test_and_validation_are_the_same_for_every_draw_and_more_labels_hold_the_fewer() -> None:
    one, other = Diabetes(labelled=20), Diabetes(teacher_patients=50, labelled=40, split_seed=3)
    assert rows(one, "test") == rows(other, "test")
    assert rows(one, "validation") == rows(other, "validation")
    assert rows(one, "labelled") < rows(Diabetes(labelled=40), "labelled")
    assert rows(one, "labelled") != rows(Diabetes(labelled=20, split_seed=1), "labelled")


def test_a_batch_is_rows_and_one_value_each_nan_without_label() -> None:
    data = Diabetes(labelled=10, unlabelled=20, batch_size=30)
    inputs, target = next(iter(data.train_dataloader()))
    assert (inputs.shape, target.shape, inputs.dtype, target.dtype) == ((30, 10), (30, 1), torch.float32, torch.float32)
    assert target.isnan().sum() == 20
    assert torch.equal(data.subset("labelled")[3][0], data.subset("labelled").rows[3])
    assert Diabetes(role="student").fingerprint() == Diabetes(role="student", unlabelled=9).fingerprint()
    assert Diabetes().fingerprint() != Diabetes(unlabelled=9).fingerprint()


def test_more_patients_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected up to 272 patients, got 200 \+ 40 \+ 60: ask for fewer"):
        Diabetes(teacher_patients=200, labelled=40, unlabelled=60).setup()
    with pytest.raises(ValueError, match="expected teacher_patients of 0 or more, got -1"):
        Diabetes(teacher_patients=-1)
