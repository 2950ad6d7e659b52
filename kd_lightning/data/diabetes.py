"""Progression of diabetes (Efron et al., Annals of Statistics, 2004), from scikit-learn's files."""

import numpy as np

from kd_lightning.data.image_data import draw
from kd_lightning.data.split_data import SplitData, check_counts
from kd_lightning.data.table import Table

_TEST, _VALIDATION = 120, 50


class Diabetes(SplitData):
    """442 patients: age, sex, body mass index, blood pressure and six blood serum figures; how the disease went on.

    The target is a measure of the progression after one year, from 25 to 346, less :attr:`target_mean` and divided by
    :attr:`target_std`, so that networks learn values of about the size of 1. The test's 120 patients and the
    validation's 50 are drawn once and for all, and then those of teacher and student.

    Args:
        teacher_patients: How many patients the teacher trains on.
        labelled: How many others the student gets with their target.
        unlabelled: How many further ones the control and the distilled student get without (target NaN).
        batch_size: Size of the training's batches.
        eval_batch_size: Size of the batches of validation and test.
        num_workers: Processes that load; 0 is the fastest for a table in memory.
        split_seed: Seed of the draw; the same for all seeds of the training.
        role: See :class:`~kd_lightning.data.FashionMNIST`.
        seed: Seed of the order of the patients, together with the epoch.

    Raises:
        ValueError: For more patients than there are, and an unknown role.

    Shape: input (N, 10), target (N, 1), float32.

    >>> Diabetes(teacher_patients=150, labelled=40, unlabelled=60).counts
    {'teacher': 150, 'labelled': 40, 'unlabelled': 60, 'validation': 50, 'test': 120}
    """

    input_shape = (10,)
    target_mean, target_std = 152.0, 77.0
    feature_names = ("age", "sex", "body mass", "blood pressure", *(f"serum {i}" for i in range(1, 7)))

    def __init__(
        self,
        teacher_patients: int = 170,
        labelled: int = 40,
        unlabelled: int = 0,
        batch_size: int = 20,
        eval_batch_size: int = 120,
        num_workers: int = 0,
        split_seed: int = 0,
        role: str = "distilled",
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, role, seed)
        check_counts(teacher_patients=teacher_patients, labelled=labelled, unlabelled=unlabelled)
        self.teacher_patients, self.labelled, self.unlabelled = teacher_patients, labelled, unlabelled
        self.split_seed = split_seed

    def load_subsets(self) -> dict[str, Table]:
        from sklearn.datasets import load_diabetes  # takes a second to import

        rows, progression = load_diabetes(return_X_y=True)
        rows = rows * np.sqrt(len(rows))  # scikit-learn gives each column a sum of squares of 1
        target = ((progression - self.target_mean) / self.target_std)[:, None]
        patients = np.arange(len(rows))
        test, validation, rest = np.split(np.random.default_rng(0).permutation(patients), [_TEST, _TEST + _VALIDATION])
        sizes = self.teacher_patients, self.labelled, self.unlabelled
        teacher, labelled, unlabelled = draw(rest, sizes, self.split_seed, "ask for fewer", of="patients")
        return {
            "teacher": Table(rows[teacher], target[teacher]),
            "labelled": Table(rows[labelled], target[labelled]),
            "unlabelled": Table(rows[unlabelled], target[unlabelled]).without_labels(),
            "validation": Table(rows[validation], target[validation]),
            "test": Table(rows[test], target[test]),
        }
