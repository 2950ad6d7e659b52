"""What changes the hash of code, and so trains a stage again."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from kd_lightning import source_code
from kd_lightning.source_code import TELLS, hash_of, hashes_of, package_hash
from tests.pipeline.tiny_training import TinyData, training

SOURCE = '''
"""A loss."""
import logging

_log = logging.getLogger(__name__)
WEIGHT = 0.5
"""Of the term."""


def loss(x, mode="mean"):
    """Return it."""
    if x < 0:
        raise ValueError(f"expected x >= 0, got {x}: " + "take another")
    if mode == "sum":
        _log.warning("%s is slow", mode)
        print("summing", x)
    return WEIGHT * x  # half of it
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# half of it", "# a half"),
        ('"""A loss."""', ""),
        ('"""Return it."""', '"""Return the loss, in nats."""'),
        ('"""Of the term."""\n', ""),
        ("    if x < 0:", "\n\n    if x < 0:"),
        ("expected x >= 0, got {x}: ", "x is {x:.3f}, expected 0 or more, "),
        ("take another", "pass another one"),
        ("%s is slow", "the mode %s takes its time"),
        ('"summing"', '"a sum of"'),
    ],
)
def test_words_change_no_hash(old: str, new: str) -> None:
    assert old in SOURCE
    assert hash_of(SOURCE.replace(old, new).encode()) == hash_of(SOURCE.encode())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.5", "0.25"),
        ("x < 0", "x <= 0"),
        ('"mean"', '"sum"'),
        ('mode == "sum"', 'mode == "total"'),
        ("raise ValueError", "raise TypeError"),
        ("WEIGHT * x", "x * WEIGHT"),
        ("print(", "store("),
    ],
)
def test_anything_else_does(old: str, new: str) -> None:
    assert old in SOURCE
    assert hash_of(SOURCE.replace(old, new).encode()) != hash_of(SOURCE.encode())


@pytest.fixture
def copy_of_package(tmp_path: Path, monkeypatch):
    """A package of which files can be edited, in the place of this one; call it for the hash as it is then."""
    package = tmp_path / "kd_lightning"
    for name in ("module.py", "cli.py", "pipeline/compare.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes((source_code._PACKAGE / name).read_bytes())
    monkeypatch.setattr(source_code, "_PACKAGE", package)

    def edited(name: str, old: str, new: str) -> str:
        text = (package / name).read_text()
        assert old in text
        (package / name).write_text(text.replace(old, new))
        return package_hash.__wrapped__()

    return edited


def test_a_reworded_message_of_this_package_trains_nothing_again(copy_of_package) -> None:
    before = package_hash.__wrapped__()
    assert copy_of_package("cli.py", "import", "import json\nimport") == before  # what it does is in the configuration
    assert copy_of_package("pipeline/compare.py", "def ", "def a_") == before
    assert copy_of_package("module.py", "The first front door", "One front door") == before
    assert copy_of_package("module.py", "def ", "def a_") != before


def test_what_is_left_out_is_there() -> None:
    assert [name for name in TELLS if not (source_code._PACKAGE / name).is_file()] == []


OWN = {
    "own_losses/__init__.py": "SCALE = 1\n",
    "own_losses/l1.py": "from .parts import difference\nfrom own_helper import weight\n\n\nclass L1:\n    pass\n",
    "own_losses/parts.py": "import math\n\nfrom numpy import abs\n\n\ndef difference(a, b):\n    return abs(a - b)\n",
    "own_losses/others.py": "X = 1\n",
    "own_helper.py": "import own_numbers as numbers\n\nweight = numbers.HALF\n",
    "own_numbers.py": "HALF = 0.5\n",
}
CONFIG = {"losses": {"l1": {"_target_": "own_losses.l1.L1", "weight": 0.5}}}


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Path:
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    new_process()


def new_process() -> None:
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_a_targets_module_and_what_it_imports_count(own: Path) -> None:
    importlib.import_module("own_losses.l1")
    found = hashes_of(CONFIG)
    assert {name for name in found if not name.endswith(" version")} == {
        "own_losses.l1",
        "own_losses",
        "own_losses.parts",
        "own_helper",
        "own_numbers",
    }
    assert "numpy version" in found


@pytest.mark.parametrize("file", [name for name in OWN if "others" not in name])
def test_an_edit_of_any_of_them_is_another_stage(own: Path, file: str) -> None:
    before = hashes_of(CONFIG)
    new_process()
    (own / file).write_text(OWN[file] + "\nadded = 3\n")
    changed = {name for name, value in hashes_of(CONFIG).items() if value != before[name]}
    assert changed == {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")}


def test_before_and_after_its_import_it_is_the_same(own: Path) -> None:
    before = hashes_of(CONFIG)
    importlib.import_module("own_losses.l1")
    assert hashes_of(CONFIG) == before


@pytest.mark.parametrize(
    "config",
    [
        {"f": {"_target_": "hydra.utils.get_method", "path": "own_helper.weight"}},
        {"a": [{"_target_": "torch.nn.Identity"}, {"_target_": "own_helper.weight", "_partial_": True}]},
        {"_target_": "own_helper.weight.real"},
    ],
)
def test_functions_lists_and_attributes_are_found(own: Path, config) -> None:
    assert {"own_helper", "own_numbers"} <= hashes_of(config).keys()


def test_the_hash_is_of_the_code_that_runs(own: Path) -> None:
    """An edit during the training is not what was trained; a reloaded module is."""
    module = importlib.import_module("own_numbers")
    config = {"x": {"_target_": "own_numbers.HALF"}}
    before = hashes_of(config)
    (own / "own_numbers.py").write_text("HALF = 0.25  # edited\n")
    assert hashes_of(config) == before
    importlib.reload(module)
    assert hashes_of(config) != before


def test_words_that_name_no_module_are_only_words(own: Path) -> None:
    (own / "own_words").mkdir()
    (own / "own_words" / "__init__.py").write_text("raise SystemExit\n")
    assert hashes_of({"path": "own_words.weight", "a": "nowhere.at.all", "b": 3, "c": {"_target_": "nowhere.K"}}) == {}


def test_a_training_made_in_python_counts_the_modules_of_its_functions() -> None:
    fingerprint = training().fingerprint(TinyData("student", 0), None)
    assert fingerprint == training().fingerprint(TinyData("student", 0), None)
    code = source_code.hashes_of({}, (training().network, training().data))
    assert {"tests.tiny", "tests.pipeline.tiny_training"} <= code.keys()


def test_an_installed_package_counts_by_its_version() -> None:
    found = hashes_of({"optimizer": {"_target_": "torch.optim.AdamW"}})
    assert found.keys() == {"torch.optim", "torch version"}


def test_another_process_finds_the_same() -> None:
    code = "from kd_lightning.source_code import package_hash; print(package_hash())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.split()[-1] == package_hash()
