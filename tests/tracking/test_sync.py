"""What a run has left in its journal is shipped later, from another machine too, once, and with nobody's password."""

import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kd_lightning.tracking import MLFlowLogger, sync
from kd_lightning.tracking.journal import Journal, history, is_ended
from tests.command import preloaded
from tests.tracking.servers import free_port


def at_once(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command here; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["kd-lightning-sync", *arguments])
    with pytest.raises(SystemExit) as ended:
        sync.main()
    if isinstance(ended.value.code, str):
        print(ended.value.code)
        return 1
    return int(ended.value.code or 0)


def logged(store: Path, **options) -> MLFlowLogger:
    """A run that is ended."""
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{store}", run_name="run", tags={"a": "tag"}, **options)
    logger.log_hyperparams({"rate": 0.1})
    for step in range(5):
        logger.log_metrics({"loss": 1 / (step + 1), "step": float(step)}, step)
    logger.experiment.log_text(logger.run_id, "said", "folder/text.txt")
    logger.finalize()
    return logger


def only_run(uri: str):
    client = MlflowClient(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "kd-lightning"]
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def assert_whole(uri: str, folder: Path) -> None:
    client, run = only_run(uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params == {"rate": "0.1"}
    assert run.data.tags["a"] == "tag"
    for name, values in history(folder).items():
        assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)] == values
    (text,) = client.list_artifacts(run.info.run_id, "folder")
    assert text.path == "folder/text.txt"


def test_offline_asks_nobody_and_a_sync_ships_it_once(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    before = store.read_bytes()
    logger = logged(store, offline=True)
    assert store.read_bytes() == before
    assert logger.run_id == logger.journal.key
    folder = logger.journal.folder
    assert folder.parent == tmp_path / "journals"
    copy = tmp_path / "another machine" / "mlruns"
    copy.mkdir(parents=True)
    shutil.copytree(tmp_path / "journals", copy / "journals")
    assert at_once([str(tmp_path / "journals")], monkeypatch) == 0
    assert "1 of 1 runs had something to ship" in capsys.readouterr().out
    assert_whole(f"sqlite:///{store}", folder)
    written = store.read_bytes()
    assert at_once([str(tmp_path / "journals")], monkeypatch) == 0  # nothing is left
    assert "0 of 1 runs had something to ship" in capsys.readouterr().out
    assert store.read_bytes() == written
    for noted in tmp_path.glob("journals/*/shipped.json"):
        noted.unlink()
    shutil.copytree(copy / "journals" / folder.name / "artifacts", folder / "artifacts")
    assert at_once([str(tmp_path / "journals")], monkeypatch) == 0  # all again: the store keeps it once
    assert_whole(f"sqlite:///{store}", folder)
    # From another machine, to the store beside the journals, and to another.
    assert at_once([str(copy)], monkeypatch) == 0
    assert_whole(f"sqlite:///{copy / 'mlflow.db'}", folder)


def test_a_sync_needs_a_store_that_is_there(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    logger = logged(store, offline=True)
    alone = tmp_path / "far" / "away" / "run"
    shutil.copytree(logger.journal.folder, alone)
    monkeypatch.chdir(alone)
    assert at_once(["."], monkeypatch) == 0  # the folder in which its store was to be is there: it is made
    assert at_once([str(tmp_path / "none")], monkeypatch) == 1
    assert "expected journals of runs (journal.jsonl) below" in capsys.readouterr().out
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    assert at_once([".", "--tracking-uri", uri], monkeypatch) == 1
    said = capsys.readouterr().out
    assert "cannot be used (connection refused)" in said
    assert "secret" not in said
    (store.parent / "mlflow.db").write_bytes(b"not a database" * 1000)
    assert at_once([str(logger.journal.folder)], monkeypatch) == 1
    assert "is damaged (" in capsys.readouterr().out


def test_a_run_without_a_store_is_shipped_where_it_is_told(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    journal = Journal(tmp_path / "stage")
    journal.begin(
        experiment="kd-lightning", name="run", tags={"a": "tag"}, params={"rate": "0.1"}, parent=None, store=None
    )
    journal.metrics({"loss": 0.5}, 3)
    journal.text("said", "text.txt")
    journal.artifact(Path(__file__), "folder", copy=False)
    (tmp_path / "changed.txt").write_text("before")
    journal.artifact(tmp_path / "changed.txt", copy=False)
    (tmp_path / "changed.txt").write_text("after")
    journal.end("FINISHED")
    journal.close()
    assert at_once([str(tmp_path)], monkeypatch) == 0
    assert "1 runs were logged to no store" in capsys.readouterr().out
    assert at_once([str(tmp_path), "--tracking-uri", f"sqlite:///{store}"], monkeypatch) == 1
    said = capsys.readouterr().out
    assert "1 other entries (runs, parameters, tags, files) were not delivered" in said
    client, run = only_run(f"sqlite:///{store}")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"text.txt", "folder"}
    assert run.info.status == "FINISHED"
    assert not (tmp_path / "stage" / "artifacts").exists()  # the copy is not needed any more


def test_parents_are_shipped_ahead_of_their_children_wherever_they_lie(store: Path, tmp_path: Path) -> None:
    keys: dict[str, str | None] = {"": None}
    for name, parent in {"z-sweep": "", "m-pipeline": "z-sweep", "a-stage": "m-pipeline"}.items():
        journal = Journal(tmp_path / name)
        journal.begin(experiment="kd-lightning", name=name, tags={}, parent=keys[parent], store=None)
        keys[name] = journal.key
        journal.end("FINISHED")
        journal.close()
    uri = f"sqlite:///{store}"
    assert sync.sync(tmp_path, uri)
    client = MlflowClient(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "kd-lightning"]
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(found) == 3
    for name, parent in {"m-pipeline": "z-sweep", "a-stage": "m-pipeline"}.items():
        assert found[name].data.tags["mlflow.parentRunId"] == found[parent].info.run_id


TRAINING = """
import sys, time
from kd_lightning.tracking import MLFlowLogger
logger = MLFlowLogger(tracking_uri=sys.argv[1], run_name="run", tags={"a": "tag"})
step = 0
while True:
    logger.log_metrics({"step": float(step)}, step)
    print(step, flush=True)
    step += 1
    time.sleep(0.002)
"""
SYNC = "from kd_lightning.tracking.sync import main; main()"


@pytest.mark.integration
def test_a_killed_training_is_closed_and_shipped_and_a_live_one_is_left_alive(
    store: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """With syncs beside it: two at once, while it logs, ships and is killed."""
    uri = f"sqlite:///{store}"
    start = partial(preloaded().start, cwd=tmp_path)
    training = start(uri, output=tmp_path / "printed", program=TRAINING)
    assert training.wait_until(lambda: len(training.printed().split()) > 500)
    syncs = [start(str(tmp_path), output=tmp_path / f"said-{i}", program=SYNC) for i in range(2)]
    assert [command.wait() for command in syncs] == [0, 0], [command.printed() for command in syncs]
    assert all("1 runs are still under way" in command.printed() for command in syncs)
    _, run = only_run(uri)
    assert run.info.status == "RUNNING"
    training.kill()
    assert training.wait() == -signal.SIGKILL
    printed = training.printed().split()
    (folder,) = tmp_path.glob("journals/*")
    assert not is_ended(folder)
    assert at_once([str(tmp_path)], monkeypatch) == 0
    client, run = only_run(uri)
    assert run.info.status == "KILLED"
    stored = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "step")]
    assert stored == history(folder)["step"]
    assert [step for step, _ in stored] == list(range(len(stored)))
    assert len(stored) > int(printed[-1]) - 1000  # what a second holds
    assert run.info.end_time >= client.get_metric_history(run.info.run_id, "step")[-1].timestamp


def test_the_next_training_closes_a_killed_one(store: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{store}"
    killed = MLFlowLogger(tracking_uri=uri, run_name="killed", offline=True)
    killed.log_metrics({"a": 1.0}, 1)
    killed.journal.close()  # as the system lets go of it
    following = MLFlowLogger(tracking_uri=uri, run_name="next")
    following.log_metrics({"a": 2.0}, 1)
    following.finalize()
    client = MlflowClient(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "kd-lightning"]
    statuses = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert statuses == {"killed": "KILLED", "next": "FINISHED"}


def test_an_offline_run_is_gone_on_with_by_its_key(store: Path) -> None:
    uri = f"sqlite:///{store}"
    first = logged(store, offline=True)
    second = MLFlowLogger(tracking_uri=uri, run_id=first.run_id)
    second.log_metrics({"step": 5.0}, 5)
    second.finalize()
    client, run = only_run(uri)
    assert run.info.run_id == second.run_id
    assert [point.step for point in client.get_metric_history(run.info.run_id, "step")] == list(range(6))


def test_passwords_are_in_no_journal_and_come_from_the_environment(tmp_path: Path, monkeypatch) -> None:
    from kd_lightning.tracking.store import named_store, store_name

    for uri, name in {
        "postgresql://me:secret@host:5433/db?sslmode=require&password=secret": "postgresql://host:5433/db?sslmode=require",
        "https://token@host/mlflow": "https://host/mlflow",
        "https://host/mlflow?access_token=secret": "https://host/mlflow",
        "databricks": "databricks",
    }.items():
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert store_name(uri, tmp_path) == name
        assert named_store(name, tmp_path) == name
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert named_store(name, tmp_path) == uri
        assert named_store("https://another", tmp_path) == "https://another"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    logger = MLFlowLogger(tracking_uri="postgresql://me:secret@127.0.0.1:9/db", offline=True)
    logger.log_metrics({"a": 1.0})
    logger.journal.close()
    assert "secret" not in (logger.journal.folder / "journal.jsonl").read_text()
