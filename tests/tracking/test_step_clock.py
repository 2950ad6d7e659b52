import time

import torch
from lightning.pytorch.loggers import CSVLogger

from kd_lightning.teachers import Teacher
from kd_lightning.tracking.step_clock import StepClock
from tests.tiny import distillation, good_teacher, loader, logged, trainer

CPU = torch.device("cpu")


def test_it_counts_the_samples_and_the_teachers_time_since_the_last_logged_step() -> None:
    clock = StepClock()
    begun = time.perf_counter()
    assert clock.step(8, CPU, True) == {}  # its beginning is not known
    for _ in range(2):
        with clock.teaching(CPU):
            time.sleep(0.05)
        found = clock.step(8, CPU, _ == 1)
    elapsed = time.perf_counter() - begun
    assert 16 / elapsed <= found["train/samples_per_s"] <= 16 / 0.1
    assert 0.1 / elapsed <= found["train/teacher_share"] <= 1
    assert found["train/peak_memory_mb"] > 50  # of torch alone
    time.sleep(0.05)
    assert clock.step(8, CPU, True)["train/teacher_share"] == 0
    clock.restart()
    assert clock.step(8, CPU, True) == {}


def test_a_training_logs_it(tmp_path) -> None:
    class Slow(Teacher):
        def __call__(self, *args, **kwargs):
            time.sleep(0.03)
            return super().__call__(*args, **kwargs)

    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=2, max_epochs=2)
    fit.fit(distillation(teacher=Slow(good_teacher())), loader(48), loader(16, seed=4))
    values = logged(tmp_path)
    assert {"train/samples_per_s", "train/teacher_share", "train/peak_memory_mb"} <= set(values)
    assert list(values["train/samples_per_s"]) == [1, 3, 5, 7, 9, 11]
    for step, rate in values["train/samples_per_s"].items():
        assert 0 < rate < 8 / 0.03
        assert values["train/teacher_share"][step] * 8 / rate > 0.029  # seconds of each step
