"""A tracking server that dies, hangs or fails stops no training and delays none; what it missed it gets later."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from mlflow import MlflowClient

from kd_lightning.tracking import MLFlowLogger
from kd_lightning.tracking.journal import history
from kd_lightning.tracking.shipping import Shipment
from tests.tiny import loader, network, trainer
from tests.tracking.servers import Server, failing, free_port, silent

STEPS = 40
LONGEST_WAIT = 1.0
"""Seconds that a call of the logger may take from the training: the promise."""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Module(pl.LightningModule):
    """Logs two values a step, and does something at one."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        super().__init__()
        self.network = network()
        self.at = at or {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step in self.at:
            self.at[self.global_step]()
        loss = torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log_dict({"train/loss": loss, "train/step": float(self.global_step)})
        self.logger.experiment.set_tag(self.logger.run_id, "step", str(self.global_step))
        if self.global_step == STEPS // 2:
            self.logger.experiment.log_text(self.logger.run_id, "half", "half.txt")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Timed(MLFlowLogger):
    """Notes how long each call takes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.waits: list[float] = []

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        begun = time.monotonic()
        super().log_metrics(*arguments, **options)
        self.waits.append(time.monotonic() - begun)


def fit(logger: MLFlowLogger, at: dict[int, Callable[[], object]] | None = None) -> pl.Trainer:
    fitting = trainer(logger=logger, max_epochs=-1, max_steps=STEPS, log_every_n_steps=1)
    with pytest.MonkeyPatch.context() as environment:  # a busy machine takes time for the first answer
        environment.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        fitting.fit(Module(at), loader())
    assert fitting.global_step == STEPS
    return fitting


@pytest.fixture(scope="module")
def server(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), database)
    server.start()
    yield server
    server.kill()


def test_a_run_that_was_made_but_not_told_is_not_made_twice(store: Path) -> None:
    """The answer was lost, or the process was killed before it noted it: the run is found by its key."""
    uri = f"sqlite:///{store}"
    logger = MLFlowLogger(experiment_name="once", tracking_uri=uri, run_name="once")
    logger.begin(params={"a": "1"})
    (noted,) = store.parent.glob("journals/*/shipped.json")
    noted.unlink()
    again = Shipment(noted.parent, uri)
    while again.waiting():
        assert again.advance(lambda: MlflowClient(uri)) is None
    assert again.run_id == logger.run_id
    assert MlflowClient(uri).get_run(again.run_id).data.params == {"a": "1"}


def test_killed_for_good_in_fit_stops_nothing_and_says_what_is_missing(server: Server, caplog) -> None:
    def kill() -> None:
        assert logger.shipper.flush()
        server.kill()

    logger = Timed(tracking_uri=server.uri, run_name="killed", patience=2)
    with caplog.at_level(logging.WARNING, "kd_lightning"):
        fit(logger, {10: kill})
        ended = time.monotonic()
    assert max(logger.waits) < LONGEST_WAIT
    away, missing = [record.getMessage() for record in caplog.records]
    assert "the training goes on" in away
    steps = STEPS - 10  # with loss, step and epoch, and a tag; and a file, and the run's end
    assert missing == (
        f"{3 * steps} metric values and {steps + 2} other entries (runs, parameters, tags, files) were not delivered "
        f"to {server.uri} (connection refused): they are kept in {logger.journal.folder}, and shipped by "
        f"kd-lightning-sync {logger.journal.folder}; the training itself is complete"
    )
    logger.log_metrics({"later": 1.0})  # and so does a call after that
    assert time.monotonic() - ended < LONGEST_WAIT


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    ("where", "what"),
    [("nothing", "connection refused"), ("silent", "no answer"), ("failing", "answers with error 500")],
)
def test_a_store_that_is_away_at_the_start_is_said_once_and_refused_where_it_is_required(
    where: str, what: str, required: bool, caplog, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with silent() as silent_uri, failing() as failing_uri:
        uri = {"nothing": f"http://127.0.0.1:{free_port()}", "silent": silent_uri, "failing": failing_uri}[where]
        logger = MLFlowLogger(tracking_uri=uri.replace("://", "://somebody:secret@"), required=required, patience=0.5)
        begun = time.monotonic()
        said = rf"the tracking store {uri.replace('://', '://[*]{3}@')} .*{what}.*"
        if required:
            with pytest.raises(OSError, match=said + "without logger.required=true"):
                logger.log_metrics({"a": 1.0})
            assert not Path("mlruns").exists()
        else:
            logger.log_metrics({"a": 1.0}, step=3)
            logger.finalize()
            line, missing = [record.getMessage() for record in caplog.records]
            assert re.match(said + "the training goes on", line)
            assert missing.startswith("1 metric values and 2 other entries")
            assert history(logger.journal.folder) == {"a": [(3, 1.0)]}
            assert "secret" not in (logger.journal.folder / "journal.jsonl").read_text()
        assert time.monotonic() - begun < 2.5 + LONGEST_WAIT


def test_the_environments_own_bounds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"  # set by us while a request lasts, and another test's logger may go on
    until(lambda: bound not in os.environ)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with silent() as uri, pytest.raises(OSError, match="no answer"):
        MLFlowLogger(tracking_uri=uri, required=True).begin()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
    until(lambda: bound not in os.environ)


def test_what_a_store_refuses_is_said_and_left_out(store: Path, caplog) -> None:
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{store}")
    client = logger.experiment
    with caplog.at_level(logging.WARNING, "kd_lightning"):
        for i in range(3):
            client.log_metric(logger.run_id, "good", float(i), step=i)
            client.log_metric(logger.run_id, "n\0t a name?", float(i), step=i)
        client.log_text(logger.run_id, "kept", "text.txt")
        logger.finalize()
    assert logger.shipper.undelivered().startswith("3 metric values were not delivered")
    (said,) = caplog.records
    assert "did not take something that was logged: Invalid value" in said.getMessage()
    assert "\n" not in said.getMessage()
    assert [metric.value for metric in client.get_metric_history(logger.run_id, "good")] == [0.0, 1.0, 2.0]
    assert [file.path for file in client.list_artifacts(logger.run_id)] == ["text.txt"]


def test_files_are_logged_as_they_were(store: Path, tmp_path: Path) -> None:
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{store}")
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a.txt"
    file.write_text("before")
    logger.experiment.log_artifact(logger.run_id, file, "files")
    logger.experiment.log_artifacts(logger.run_id, tmp_path / "folder")
    file.write_text("after")
    file.unlink()
    assert logger.shipper.flush()
    for name in ("files/a.txt", "a.txt"):
        assert Path(logger.experiment.download_artifacts(logger.run_id, name)).read_text() == "before"
