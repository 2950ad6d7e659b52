"""A run says of which commit its code was."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kd_lightning.tracking import MLFlowLogger
from kd_lightning.tracking import logger as of_logger
from kd_lightning.tracking.origin import git_tags

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(*arguments: str, cwd: Path) -> str:
    settings = ["-c", "user.name=me", "-c", "user.email=me@example.com", "-c", "init.defaultBranch=work"]
    ran = subprocess.run(["git", *settings, *arguments], cwd=cwd, check=True, capture_output=True, text=True)
    return ran.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit, a remote with a token, and a folder that is ignored."""
    folder = tmp_path / "repository"
    (folder / "ignored").mkdir(parents=True)
    (folder / ".gitignore").write_text("ignored\n")
    git("init", "-q", cwd=folder)
    git("add", ".", cwd=folder)
    git("commit", "-q", "-m", "first", cwd=folder)
    git("remote", "add", "origin", "https://me:secret@git.example/me/code.git", cwd=folder)
    return folder


def test_a_run_has_the_commit_of_the_working_directory(repository: Path, store: Path, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    for found_before in (git_tags, of_logger._context):
        found_before.cache_clear()
    try:
        logger = MLFlowLogger(tracking_uri=f"sqlite:///{store}")
        logger.log_metrics({"x": 1.0})
        logger.finalize("success")
        assert logger.shipper.flush()
        tags = MlflowClient(f"sqlite:///{store}").get_run(logger.run_id).data.tags
    finally:
        for found in (git_tags, of_logger._context):
            found.cache_clear()
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD", cwd=repository)
    assert tags["mlflow.source.git.branch"] == "work"
    assert "git.example/me/code.git" in tags["mlflow.source.git.repoURL"]
    assert "secret" not in str(tags)


def test_what_is_of_no_commit_has_no_tags(repository: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    git("init", "-q", cwd=empty)
    for folder in (tmp_path, empty, repository / "ignored"):
        assert git_tags(str(folder)) == {}
    git("checkout", "-q", "--detach", cwd=repository)
    assert set(git_tags(str(repository))) == {"mlflow.source.git.commit", "mlflow.source.git.repoURL"}


def test_without_git_there_are_none_and_nothing_is_said(repository: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GIT_PYTHON_GIT_EXECUTABLE", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "git"]:
        monkeypatch.delitem(sys.modules, name)  # it looks for git when it is imported
    with pytest.raises(ImportError):
        import git  # noqa: F401
    git_tags.cache_clear()
    assert git_tags(str(repository)) == {}
    assert capfd.readouterr() == ("", "")
