"""Pipelines and methods can be told apart by their names."""

from pathlib import Path

import pytest

from kd_lightning.configuration.names import method_name, pipeline_name, sweep_of

LINEAR = {"_target_": "kd_lightning.schedules.linear", "start": 8.0, "end": 1.0}
LOSSES = {"hard_label": {"weight": 0.1}, "kd": {"temperature": 4.0}, "dkd": {"temperature": 2.0}}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "fashion_mnist"),
        (["losses.kd.temperature=2", "models@student.network=cnn8"], "fashion_mnist T=2 cnn8"),
        (["name=x", "work_dir=/a", "logger.tracking_uri=http://a", "trainer.log_every_n_steps=1"], "fashion_mnist"),
        (["data=fashion_mnist", "data.unlabelled=500"], "fashion_mnist unlabelled=500"),
        (["losses=[hard_label,kd,hint]", "seeds=[0]"], "fashion_mnist hard_label+kd+hint seeds=0"),
        (["teacher.trainer.max_steps=60", "trainer.max_steps=12"], "fashion_mnist teacher.max_steps=60 max_steps=12"),
        (["~callbacks", "+trainer.x='a b'"], "fashion_mnist no callbacks x=ab"),
    ],
)
def test_a_pipeline_is_named_by_what_differs(overrides: list[str], name: str) -> None:
    assert pipeline_name("fashion_mnist", overrides) == name


def test_a_name_fits_a_line() -> None:
    assert len(pipeline_name("data", [f"losses.{'x' * 50}{i}.weight={'9' * 99}" for i in range(20)])) == 120


@pytest.mark.parametrize(
    ("callbacks", "name"),
    [
        ({}, "kd-T4+dkd-T2"),
        ({"a": {"_target_": "kd_lightning.callbacks.TemperatureSchedule", "schedule": LINEAR}}, "kd-T8to1+dkd-T8to1"),
        ({"a": {"_target_": "x.TemperatureSchedule", "schedule": LINEAR, "loss": "dkd"}}, "kd-T4+dkd-T8to1"),
        (
            {"a": {"_target_": "x.HyperparameterSchedule", "schedule": LINEAR, "path": "losses.kd.temperature"}},
            "kd-T8to1+dkd-T2",
        ),
        (
            {"a": {"_target_": "x.HyperparameterSchedule", "schedule": LINEAR, "path": "losses.kd.x"}},
            "kd-T4+dkd-T2",
        ),
        ({"on_policy": {"_target_": "x.OnPolicy"}}, "kd-T4+dkd-T2+on_policy"),
    ],
)
def test_a_method_has_the_temperature_that_it_trains_at(callbacks: dict, name: str) -> None:
    assert method_name(LOSSES, callbacks) == name


def test_the_labels_loss_is_named_where_it_is_alone() -> None:
    assert method_name({"hard_label": {}}, {}) == "hard_label"


def test_a_sweep_is_named_by_what_its_jobs_share_and_compares_them_by_what_they_do_not() -> None:
    swept = ["losses.kd.temperature=2", "seeds=[0]", "logger.tracking_uri=http://me:secret@there"]
    sweep = sweep_of("fashion_mnist", [*swept, "trainer.max_steps=12"], swept, Path("sweeps"))
    assert sweep.name == "fashion_mnist max_steps=12: sweep over T, seeds"
    assert sweep.params == {"sweep/losses.kd.temperature": "2", "sweep/seeds": "[0]"}
