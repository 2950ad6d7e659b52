"""docker/ read as text: no Docker daemon is needed, and what would be unsafe or missing in a build fails here."""

import re
import shlex
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header
from sqlalchemy.engine import make_url

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
VARIABLE = re.compile(r"\$\{(\w+)(?::?([-?+])([^}]*))?\}")


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def _stages() -> dict[str, list[tuple[str, str]]]:
    stages: dict[str, list[tuple[str, str]]] = {}
    for word, rest in _instructions():
        if word == "FROM":
            stages[rest.split()[-1]] = []
        if stages:
            stages[list(stages)[-1]].append((word, rest))
    return stages


def _context_sources() -> list[str]:
    """What the Dockerfile takes from the build context, by COPY or by a bind mount."""
    sources = []
    for word, rest in _instructions():
        if word in ("COPY", "ADD"):
            words = shlex.split(rest)
            if not any(w.startswith("--from=") for w in words):
                sources += [w for w in words[:-1] if not w.startswith("--")]
        for mount in re.findall(r"--mount=(\S+)", rest):
            options = dict(part.partition("=")[::2] for part in mount.split(","))
            if options["type"] == "bind" and "from" not in options:
                sources.append(options["source"])
    return sources


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


def _option(command: str, name: str) -> str:
    words = shlex.split(command)
    return words[words.index(name) + 1]


def test_services(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "tracking", "train"}
    assert services["train"]["profiles"], "`docker compose up` must not start a training"


def test_postgres_has_a_pinned_major(services: dict[str, Any]) -> None:
    assert re.fullmatch(r"postgres:\d+(\.\d+)?(-\w+)?", services["postgres"]["image"])


def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["tracking"]
    for port in published["tracking"]:
        assert port.startswith("127.0.0.1:")
    assert not any("network_mode" in service for service in services.values())


def test_no_password_is_written_down(services: dict[str, Any]) -> None:
    passwords = {
        f"{name}.{key}": value
        for name, service in services.items()
        for key, value in service.get("environment", {}).items()
        if re.search("password|secret|token", key, re.IGNORECASE)
    }
    assert set(passwords) == {"postgres.POSTGRES_PASSWORD", "tracking.PGPASSWORD"}
    for value in passwords.values():
        match = VARIABLE.fullmatch(value)
        assert match, "a password comes from .env"
        assert match[2] == "?", "an unset password is an error, not a default"
    assert make_url(_option(services["tracking"]["command"], "--backend-store-uri")).password is None


def test_every_variable_is_in_the_example_and_no_other() -> None:
    # Comments are no YAML values: a variable that only a comment names is not used.
    used = set(re.findall(r"\$\{(\w+)", re.sub(r"(^|\s)#.*", "", (DOCKER / "compose.yaml").read_text())))
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), flags=re.MULTILINE))
    assert used == set(example)
    assert example["POSTGRES_PASSWORD"] == "", "an example password would be used as it is"


def test_git_ignores_env_but_not_the_example() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0

    assert ignored("docker/.env")
    assert not ignored("docker/.env.example")


def test_each_service_waits_for_a_healthy_one(services: dict[str, Any]) -> None:
    for waiting, awaited in (("tracking", "postgres"), ("train", "tracking")):
        assert services[waiting]["depends_on"] == {awaited: {"condition": "service_healthy"}}
        assert services[awaited]["healthcheck"]["test"][0] == "CMD"


def test_health_check_of_the_server_asks_its_own_port(services: dict[str, Any]) -> None:
    *_, python, flag, code = services["tracking"]["healthcheck"]["test"]
    assert (python, flag) == ("python", "-c")  # slim images have no curl
    compile(code, "healthcheck", "exec")
    assert f"127.0.0.1:{_option(services['tracking']['command'], '--port')}/health" in code


def test_training_reaches_the_server(services: dict[str, Any]) -> None:
    command = services["tracking"]["command"]
    uri = services["train"]["environment"]["MLFLOW_TRACKING_URI"]
    assert uri == f"http://tracking:{_option(command, '--port')}"
    allowed = _option(command, "--allowed-hosts").split(",")
    for host in (uri.removeprefix("http://"), "localhost:5000", "127.0.0.1:8080"):
        assert is_allowed_host_header(allowed, host), host
    assert not is_allowed_host_header(allowed, "evil.example")
    assert _option(command, "--host") == "0.0.0.0"  # within the container; ports publishes it on loopback


def test_the_server_finds_its_driver_and_database(services: dict[str, Any]) -> None:
    url = make_url(_option(services["tracking"]["command"], "--backend-store-uri"))
    postgres = services["postgres"]["environment"]
    assert url.drivername == "postgresql+psycopg2"
    assert (url.host, url.username, url.database) == ("postgres", postgres["POSTGRES_USER"], postgres["POSTGRES_DB"])
    assert any("psycopg2-binary==" in rest for word, rest in _stages()["tracking"] if word == "RUN")


def test_what_is_written_is_on_a_named_volume(compose: dict[str, Any]) -> None:
    mounts = {name: dict(v.split(":") for v in s["volumes"]) for name, s in compose["services"].items()}
    assert {volume for mount in mounts.values() for volume in mount} == set(compose["volumes"])
    command = compose["services"]["tracking"]["command"]
    assert list(mounts["tracking"].values()) == [_option(command, "--artifacts-destination")]
    assert ("WORKDIR", *mounts["train"].values()) in _stages()["train"]
    for name in ("tracking", "train"):  # a volume on a folder that the image lacks belongs to root
        (path,) = mounts[name].values()
        assert any(word == "RUN" and re.search(rf"install -d -o kd -g kd {path}\b", r) for word, r in _stages()[name])


@pytest.mark.parametrize("service", ["tracking", "train"])
def test_images_come_from_the_dockerfile(services: dict[str, Any], service: str) -> None:
    build = services[service]["build"]
    context = (DOCKER / build["context"]).resolve()
    assert context == ROOT
    assert context / build["dockerfile"] == DOCKER / "Dockerfile"
    assert build["target"] in _stages()
    arguments = {rest.partition("=")[0] for word, rest in _stages()[build["target"]] if word == "ARG"}
    assert set(build.get("args", {})) <= arguments


def test_train_is_the_default_image_and_runs_the_command_line() -> None:
    assert list(_stages())[-1] == "train"
    assert ("ENTRYPOINT", '["kd-lightning"]') in _stages()["train"]


@pytest.mark.parametrize("stage", ["tracking", "train"])
def test_no_process_runs_as_root(stage: str) -> None:
    users = [rest for word, rest in _stages()[stage] if word == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert any(word == "RUN" and f"useradd --create-home --uid 1000 {users[-1]}" in r for word, r in _stages()[stage])


def test_base_image_is_pinned_and_new_enough() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in _instructions() if word == "ARG")
    for stage in _stages().values():
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], stage[0][1].split()[0])
        match = re.fullmatch(r"python:3\.(\d+)(\.\d+)?-slim-\w+", image)
        assert match, image
        assert int(match[1]) >= 11


def test_every_install_is_constrained() -> None:
    installs = [rest for word, rest in _instructions() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    for install in installs:
        assert re.search(r"pip install .*-c \S*constraints\.txt", install), install


def test_copied_files_exist_and_are_in_the_build_context() -> None:
    sources = _context_sources()
    assert {"pyproject.toml", "conf", "kd_lightning", "tests/constraints.txt"} <= set(sources)
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    for source in sources:
        assert (ROOT / source).exists(), source
        parents = [source, *map(str, PurePosixPath(source).parents)]
        assert any(f"!{path}" in ignore for path in parents), f"{source} is kept out by Dockerfile.dockerignore"


def test_the_wheel_is_built_from_all_that_pyproject_names() -> None:
    sources = _context_sources()
    pyproject = (ROOT / "pyproject.toml").read_text()
    for name in ("README.md", "LICENSE", "conf", "kd_lightning"):
        assert name in pyproject
        assert name in sources
