"""The same command is answered by what it found, unless anything that it depends on has changed."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kd_lightning.answers import Answer, Question, existing, find, keep, question
from kd_lightning.data import CIFAR10, Completions, FashionMNIST, ShakespeareText, TextFiles
from kd_lightning.report.table import Table
from kd_lightning.report.words import Words
from kd_lightning.tracking.sqlite import create_database
from kd_lightning.tracking.store import store_name

ANSWER = Answer(
    tables=(Table(("", "accuracy %"), (("teacher", "90.0 ± –"), ("distilled", "80.0 ± 0.1")), "a note"),),
    words=Words("Worth it: by 3 points.", ("one", "two"), ()),
    objective=0.5,
    verdict="mlruns/stages/pipeline-1/verdict.json",
    report="mlruns/stages/pipeline-1/report.html",
    places=("a place",),
)


class Project:
    """A user's folder, with all that an answer depends on; nothing is trained."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.chdir(folder)
        monkeypatch.setenv("DATA_ROOT", "/here")
        monkeypatch.syspath_prepend(str(folder))
        self.config: dict[str, Any] = {
            "work_dir": "mlruns/stages",
            "losses": {"kd": {"_target_": "kd_lightning.losses.KD", "temperature": 4.0}},
            "models": {"student": {"_target_": "nets_of_mine.Student"}},
            "teacher": {"checkpoint": "teacher.ckpt", "seed": 0},
        }
        self.overrides = ["losses.kd.temperature=4"]
        self.pipeline, self.stage = folder / "mlruns/stages/pipeline-1", folder / "mlruns/stages/teacher-1"
        for path, content in {
            "conf/config.yaml": "seeds: [0]",
            "nets_of_mine.py": "Student = 1\n",
            "lazy_of_mine.py": "helper = 1\n",
            "teacher.ckpt": "weights",
            "images/train/0.png": "image",
            "images/train/lock/0.png": "image",
            "elsewhere.png": "image",
            "mlruns/stages/pipeline-1/verdict.json": "{}",
            "mlruns/stages/pipeline-1/report.html": "page",
            "mlruns/stages/teacher-1/final.ckpt": "weights",
            "mlruns/stages/teacher-1/lock": "",
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)
        monkeypatch.delitem(sys.modules, "nets_of_mine", raising=False)
        __import__("nets_of_mine")
        time.sleep(0.1)  # what is there was there before the command

    def ask(self, since: int | None = None) -> Question | None:
        return question(self.config, self.overrides, ["conf"], time.time_ns() if since is None else since)

    def keep(self, answer: Answer = ANSWER, since: int | None = None) -> None:
        asked = self.ask(since)
        assert asked is not None
        keep(self.pipeline, asked, answer, [str(self.folder / "lazy_of_mine.py")], ["images"], [self.stage])

    def found(self) -> Answer | None:
        asked = self.ask()
        return None if asked is None else find(asked)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def test_it_is_found_again_as_it_was_and_says_when(project: Project) -> None:
    assert project.found() is None
    project.keep()
    found = project.found()
    assert found is not None
    assert found.at.startswith("20")
    assert {**vars(found), "at": ""} == vars(ANSWER)


def test_what_tells_nothing_of_the_outcome_may_change(project: Project) -> None:
    project.keep()
    (project.stage / "lock").write_text("of another command")
    (project.pipeline / "shipped.json").write_text("{}")
    (project.pipeline / "report.html").write_text("made again")
    (project.folder / "conf/notes.txt").write_text("no configuration")
    (project.folder / "conf/mlruns").mkdir()
    (project.folder / "conf/mlruns/conda.yaml").write_text("of a model")
    (project.folder / "__pycache__").mkdir(exist_ok=True)
    assert project.found() is not None


def rewrite(path: str) -> Callable[[Project], None]:
    """Write a file again with other bytes, of the same number and with the same time of modification."""

    def change(project: Project) -> None:
        file = project.folder / path
        before = file.stat()
        file.write_text(file.read_text()[::-1])
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


def test_of_more_files_than_can_be_looked_at_none_is_kept(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_lightning.watched_files._MOST", 100)  # the package alone has more
    project.keep()
    assert not list(project.pipeline.glob("answer-*"))


def package(project: Project) -> None:
    (project.folder / "torch_of_mine-2.0.dist-info").mkdir()


CHANGES: dict[str, Callable[[Project], object]] = {
    "a value": lambda p: p.config["losses"]["kd"].update(temperature=2.0),
    "an override": lambda p: p.overrides.append("seeds=[0]"),
    "a configuration's file": rewrite("conf/config.yaml"),
    "another configuration's file": lambda p: (p.folder / "conf/more.yaml").write_text("a: 1"),
    "a module of one's own": rewrite("nets_of_mine.py"),
    "a module that is imported late": rewrite("lazy_of_mine.py"),
    "a checkpoint that is named": rewrite("teacher.ckpt"),
    "a sample": rewrite("images/train/0.png"),
    "another sample": lambda p: (p.folder / "images/train/1.png").write_text("image"),
    "a sample of a class that is called lock": rewrite("images/train/lock/0.png"),
    "a sample less": lambda p: (p.folder / "images/train/0.png").unlink(),
    "a folder of samples": lambda p: _other_folder(p.folder / "images"),
    "where a link leads": lambda p: _as_link(p.folder / "images", p.folder / "again"),
    "an environment variable": lambda p: os.environ.update(DATA_ROOT="/elsewhere"),
    "trained weights": rewrite("mlruns/stages/teacher-1/final.ckpt"),
    "a stage less": lambda p: p.stage.rename(p.folder / "elsewhere"),
    "the verdict": rewrite("mlruns/stages/pipeline-1/verdict.json"),
    "no report": lambda p: (p.pipeline / "report.html").unlink(),
    "an installed package": package,
    "the answer itself, torn": lambda p: next(p.pipeline.glob("answer-*")).write_text('{"sha256": "0", "ans'),
    "the answer itself, changed": lambda p: _replace(next(p.pipeline.glob("answer-*")), "80.0", "99.0"),
}


def _other_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("other"), copy_function=os.link)  # the very same files
    folder.rename(folder.with_name("before"))
    folder.with_name("other").rename(folder)


def _as_link(folder: Path, to: Path) -> None:
    folder.rename(to)
    folder.symlink_to(to)


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_not_found_after_a_change_of(project: Project, change: str) -> None:
    project.keep()
    assert project.found() is not None
    CHANGES[change](project)
    assert project.found() is None


def test_it_is_not_found_in_another_environment_or_folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.keep()
    with monkeypatch.context() as changed:
        changed.setenv("OMP_NUM_THREADS", "37")
        assert project.found() is None
    for name, value in (("LOCAL_RANK", "0"), ("NODE_RANK", "0"), ("SLURM_NTASKS", "2")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert project.ask() is None
    assert project.found() is not None
    (project.folder / "sub").mkdir()
    monkeypatch.chdir(project.folder / "sub")
    asked = project.ask()
    assert asked is not None
    assert find(replace(asked, work_dir=Path("../mlruns/stages"))) is None


@pytest.mark.parametrize("path", ["nets_of_mine.py", "images/train/0.png", "conf/config.yaml", "teacher.ckpt"])
def test_none_is_kept_of_what_was_edited_while_the_command_ran(project: Project, path: str) -> None:
    since = time.time_ns()
    rewrite(path)(project)
    project.keep(since=since)
    assert project.found() is None
    time.sleep(0.1)
    project.keep()
    assert project.found() is not None


def test_none_is_kept_where_a_link_was_set_to_other_samples_while_the_command_ran(project: Project) -> None:
    (project.folder / "images").rename(project.folder / "one")
    shutil.copytree(project.folder / "one", project.folder / "two")
    time.sleep(0.1)
    since = time.time_ns()
    (project.folder / "images").symlink_to(project.folder / "two")
    project.keep(since=since)
    assert project.found() is None


HUBS = ("kd_lightning.models.hugging_face", "torch.hub.load", "transformers.AutoModel.from_pretrained")


@pytest.mark.parametrize("target", HUBS)
def test_what_may_read_from_elsewhere_has_to_run(project: Project, target: str) -> None:
    (project.folder / "transformers").mkdir()  # of something else
    project.config["models"]["student"]["_target_"] = target
    assert project.ask() is None


def test_own_weights_that_a_function_of_ones_own_brings_have_to_be_looked_at(project: Project) -> None:
    project.config["teacher"]["checkpoint"] = "pretrained"
    assert project.ask() is None
    project.config["models"]["student"]["_target_"] = "kd_lightning.models.CNN8"
    assert project.ask() is not None


def test_what_is_registered_in_mlflow_is_gone_through(project: Project) -> None:
    project.config["logger"] = {"register": "student"}
    assert project.ask() is None


def is_asked_for_the_runs(project: Project, uri: str) -> None:
    """Check that a store which has lost one of the runs makes the pipeline run."""
    client = MlflowClient(uri)
    experiment = client.create_experiment("of an answer")
    runs = tuple(client.create_run(experiment).info.run_id for _ in range(2))
    store = store_name(uri, project.pipeline)
    project.keep(Answer(**{**vars(ANSWER), "store": store, "experiment": experiment, "runs": runs}))
    assert project.found() is not None
    client.delete_run(runs[1])
    assert project.found() is None
    client.restore_run(runs[1])
    assert project.found() is not None


def test_runs_that_the_store_no_longer_has_are_made_again(project: Project) -> None:
    file = project.folder / "mlruns/mlflow.db"
    create_database(file)
    is_asked_for_the_runs(project, f"sqlite:///{file}")
    file.rename(project.folder / "gone.db")
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):  # which the command leaves to the pipeline
        project.found()


def test_data_modules_say_what_they_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be")
    text = str(tmp_path / "a.txt")
    assert FashionMNIST().sources() == ()
    assert ShakespeareText().sources() == []

    class Other(FashionMNIST):
        """Reads what this package does not know."""

    assert Other().sources() is None
    assert CIFAR10(folder=tmp_path).sources() == [tmp_path / CIFAR10.archive]
    files = {role: [text] for role in ("teacher", "student", "validation", "test")}
    assert TextFiles([text]).sources() == [Path(text)]
    assert TextFiles([text], tokens="tokenizer.json").sources() == [Path("tokenizer.json"), Path(text)]
    with pytest.raises(ValueError, match="one role"):
        TextFiles(files)
    completions = Completions(TextFiles([text]), files=[text])
    assert completions.sources() == [Path(text), Path(text)]

    class Mine(ShakespeareText):
        """Reads what this package does not know."""

    assert Mine().sources() is None
    assert Completions(Mine(), files=[text]).sources() is None


def test_what_a_data_module_says_it_reads_has_to_be_there(tmp_path: Path) -> None:
    assert existing([tmp_path, str(tmp_path)]) == [str(tmp_path)] * 2
    for wrong in (str(tmp_path), tmp_path, [tmp_path / "*.csv"], ["~/data"]):
        with pytest.raises(ValueError, match=r"expected sources\(\) of the data module"):
            existing(wrong)


def test_neither_answers_nor_reports_import_what_takes_seconds() -> None:
    program = (
        "import sys; sys.argv = ['kd-lightning']\n"
        "import kd_lightning.cli, kd_lightning.answers, kd_lightning.report.report_command\n"
        "print([name for name in ('torch', 'lightning', 'mlflow', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
