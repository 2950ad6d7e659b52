import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Before torch is imported, here, in the workers and in the commands that tests start: with more processes than cores,
# OpenMP's threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test reports to the server of whoever runs it, or to the makers of the runtimes.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# A report that cannot be written fails no pipeline, but the test.
os.environ["KD_RAISE_ERRORS_OF_REPORT"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("MLFLOW_EXPERIMENT_NAME", None)
os.environ.pop("MLFLOW_RUN_ID", None)
os.environ.pop("MLFLOW_HTTP_REQUEST_MAX_RETRIES", None)

import pytest
from filelock import FileLock
from hypothesis import settings

from tests import shortcuts
from tests.command import TINY, kd_lightning

# An example takes as long as the machine is busy: hypothesis' 200 ms are no bound for a test.
settings.register_profile("kd-lightning", deadline=None)
settings.load_profile("kd-lightning")

collect_ignore = ["benchmarks"]  # programs that print, and import each other as such

LONG_FILES = (  # by what each takes
    "reliability/test_interruptions.py",
    "test_configs.py",
    "pipeline/test_pipeline.py",
    "reliability/test_disk.py",
    "tracking/test_commands.py",
    "pipeline/test_teachers.py",
    "pipeline/test_quantize.py",
    "integration/test_own_task.py",
    "integration/test_wheel.py",
    "integration/test_third_party_module.py",
    "callbacks/test_distillation_rehearsal.py",
    "stored_outputs/test_faults.py",
)
"""Begun first, so that no worker is left with one of them at the end."""
MOST_WORKERS = 8  # each imports torch, MLflow and the runtimes: about a gigabyte


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return a worker for each core that this process may use; none for a single file, or on one core."""
    if len(config.args) == 1 and config.args[0].partition("::")[0].endswith(".py"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # the order of pytest_collection_modifyitems
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="kd-lightning-tests-")
        os.environ[shortcuts.DATABASE] = f"{folder.name}/mlflow.db"
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(tryfirst=True)  # ahead of fixtures
def pytest_runtest_setup() -> None:
    shortcuts.take(imported=True)


@pytest.hookimpl(trylast=True)  # of what is left to run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, then those with the most tests; within a file, nothing changes."""
    tests = Counter(item.path for item in items)
    places = {path: i for i, path in enumerate(Path(__file__).parent / name for name in LONG_FILES)}
    items.sort(key=lambda item: (places.get(item.path, len(places)), -tests[item.path], str(item.path)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skipped(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skipped(report)


def _note_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Write down which tests were skipped, where a file is named for it: .ci/run repeats them with the extras."""
    file = os.environ.get("KD_SKIPPED_TESTS")
    if file and report.skipped and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(file, "a", encoding="utf-8") as skipped:
            skipped.write(f"{report.nodeid}\n")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """A test draws what it draws alone, whichever ones ran before it in its worker."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled_anew():
    """No test finds another's graphs: after eight of one ``forward``, PyTorch compiles it no more."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of one small pipeline, and what it printed; read-only, and the same for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    record = base / "finished.json"
    with FileLock(base / "finished.lock"):
        if not record.is_file():
            folder = tmp_path_factory.mktemp("finished")
            record.write_text(json.dumps([str(folder), kd_lightning(*TINY, cwd=folder)]))
    folder, printed = json.loads(record.read_text())
    return Path(folder), printed
