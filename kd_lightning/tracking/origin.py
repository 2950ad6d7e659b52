"""Which code made a run, as MLflow notes it: the git commit of the working directory."""

import logging
from functools import cache
from pathlib import Path

from kd_lightning.tracking.calls import without_credentials


@cache
def git_tags(folder: str | None = None) -> dict[str, str]:
    """Return the tags of the repository that a folder is in; none outside of one, without a commit, or without git.

    MLflow itself looks where the started script lies, which for a command is no repository.

    Args:
        folder: The working directory unless given.
    """
    from mlflow.utils import git_utils

    logging.getLogger(git_utils.__name__).setLevel(logging.ERROR)  # it warns of a git that is not installed
    path = folder or str(Path.cwd())
    commit = git_utils.get_git_commit(path)
    if commit is None:
        return {}
    found = {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": git_utils.get_git_branch(path),
        "mlflow.source.git.repoURL": git_utils.get_git_repo_url(path),
    }
    return {name: without_credentials(value) for name, value in found.items() if value}
