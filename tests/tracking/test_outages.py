"""One training through every outage, on SQLite and on PostgreSQL: no step waits, and the store has each value once."""

import logging
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kd_lightning.tracking.journal import history
from tests.tiny import loader, trainer
from tests.tracking.servers import Between, Postgres, Server
from tests.tracking.test_dead_server import LONGEST_WAIT, Module, Timed, until

pytestmark = pytest.mark.integration

STEPS = 60


@pytest.fixture(scope="module", params=["SQLite", "PostgreSQL"])
def server(
    request: pytest.FixtureRequest, database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with ExitStack() as stack:
        store: Path | str = database
        if request.param == "PostgreSQL":
            if missing := Postgres.missing():
                pytest.skip(missing)
            postgres = Postgres()
            stack.callback(postgres.stop)
            postgres.start()
            store = postgres.uri
        server = Server(tmp_path_factory.mktemp("server"), store)
        server.start()
        stack.callback(server.kill)
        yield server


def test_no_outage_stops_a_training_or_costs_a_value(server: Server, tmp_path: Path, caplog) -> None:
    between = Between(server.port)
    uri = between.uri.replace("://", "://me:a-token@")
    logger = Timed(tracking_uri=uri, run_name="outages", patience=60)
    said = lambda words: sum(words in record.getMessage() for record in caplog.records)  # noqa: E731

    def at(step: int) -> None:
        if step == 5:
            between.fails = True
        if step == 15:
            until(lambda: said("(it answers with error 500)") == 1)
            between.fails, between.seconds = False, 0.5
        if step == 25:
            until(lambda: said("answers again") == 1)
            between.seconds = 0.0
            server.send(signal.SIGSTOP)
        if step == 35:
            server.send(signal.SIGCONT)
            server.kill()
            until(lambda: said("does not take what is logged") == 2)
        if step == 45:
            server.start()

    try:
        fitting = trainer(logger=logger, max_epochs=-1, max_steps=STEPS, log_every_n_steps=1)
        with caplog.at_level(logging.WARNING, "kd_lightning"), pytest.MonkeyPatch.context() as environment:
            environment.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
            fitting.fit(Module({step: lambda step=step: at(step) for step in range(STEPS)}), loader())
    finally:
        between.close()
    assert fitting.global_step == STEPS
    assert max(logger.waits) < LONGEST_WAIT
    assert said("answers again") == 2
    client = MlflowClient(server.uri)
    run = client.get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["step"] == str(STEPS - 1)
    assert [file.path for file in client.list_artifacts(logger.run_id)] == ["half.txt"]
    kept = history(logger.journal.folder)
    assert set(kept) == set(run.data.metrics) == {"train/loss", "train/step", "epoch"}
    for name, values in kept.items():
        stored = client.get_metric_history(logger.run_id, name)
        assert [(metric.step, metric.value) for metric in stored] == values, name
    assert [step for step, _ in kept["train/step"]] == list(range(STEPS))
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(b"a-token" in content for content in written)
    assert "a-token" not in caplog.text + str(run.data.tags) + str(run.data.params)
    assert not re.search("Traceback", caplog.text)
