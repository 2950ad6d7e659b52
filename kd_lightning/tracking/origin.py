"""Which code made a run, as MLflow notes it: the git commit of the working directory."""

from functools import cache
from pathlib import Path


@cache
def git_tags(folder: str | None = None) -> dict[str, str]:
    """Return the tags of the repository that a folder is in; none outside of one, or without git.

    MLflow itself looks where the started script lies, which for a command is no repository.

    Args:
        folder: The working directory unless given.
    """
    from mlflow.utils import git_utils

    path = folder or str(Path.cwd())
    found = {
        "mlflow.source.git.commit": git_utils.get_git_commit(path),
        "mlflow.source.git.branch": git_utils.get_git_branch(path),
        "mlflow.source.git.repoURL": git_utils.get_git_repo_url(path),
    }
    return {name: value for name, value in found.items() if value}
