"""The wheel, built from this checkout and used where no checkout is."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
TINY_RUN = [
    "stages=[teacher,student,distilled,quantized,verdict]",
    "teacher.trainer.max_steps=60",
    "trainer.max_steps=4",
    "quantized.steps=4",
    "quantized.weights_only=null",
    "seeds=[0]",
]


def _run(command: list[str | Path], cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW_"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a new environment: the wheel, and this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True, with_pip=False)
    scripts = folder / "bin"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    _run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], cwd=folder)
    # .pth files in a folder that a .pth file names are not read: an editable install stays invisible.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    others = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site_packages / "others.pth").write_text("\n".join(others) + "\n")
    return scripts


def test_the_wheel_holds_the_package_with_its_configs_and_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(base).as_posix()
        for base, folder in ((ROOT, "kd_lightning"), (ROOT, "conf"))
        for path in (base / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected = {f"kd_lightning/{name}" if name.startswith("conf/") else name for name in expected}
    assert {n for n in names if ".dist-info/" not in n} == expected
    assert {
        "kd_lightning/conf/config.yaml",
        "kd_lightning/data/fashion_mnist_15k.npz",
        "kd_lightning/data/completions.jsonl.xz",
        "kd_lightning/data/shakespeare.txt.xz",
        "kd_lightning/py.typed",
    } <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    code = "import kd_lightning, importlib.metadata as m; print(kd_lightning.__file__, m.version('kd-lightning'))"
    file, _ = _run([installed / "python", "-c", code], cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent)


@pytest.mark.parametrize("command", [["kd-lightning"], ["python", "-m", "kd_lightning"]])
def test_help(installed: Path, tmp_path: Path, command: list[str]) -> None:
    out = _run([installed / command[0], *command[1:], "--help"], cwd=tmp_path)
    assert "seeds" in out
    assert not any(tmp_path.iterdir()), "--help writes nothing"


def test_a_tiny_run_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    _run([installed / "kd-lightning", *TINY_RUN], cwd=tmp_path)
    assert (tmp_path / "mlruns" / "mlflow.db").is_file()
    assert list((tmp_path / "mlruns" / "artifacts").rglob("verdict.json")), "the verdict is an artifact"
