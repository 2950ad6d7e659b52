"""Sessions of a runtime in a process that forks, and what the runtimes do besides."""

import gc
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd_lightning.export.sessions import in_onnxruntime, in_openvino

X = np.ones((2, 6), np.float32)

EXPORT = """
import sys, torch
from torch import nn
from kd_lightning.export import export

network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
for name in sys.argv[1:]:
    format = "onnx" if name.endswith(".onnx") else "openvino"
    export(network, torch.randn(8, 64), name, format=format, precision="int4", least_agreement=0)
"""


SIGNAL = """
import os, signal, sys
from kd_lightning.export.sessions import in_openvino

one, two = (in_openvino(sys.argv[1], threads=1) for _ in range(2))
del one
del two
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
ROOT = Path(__file__).parents[2]


class Collecting(Dataset[Tensor]):
    """As a worker does once it has made some thousand objects."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        gc.collect()
        return torch.tensor(index)


class Trained:
    """A trainer and its module, say, which refer to each other."""

    def __init__(self, session: object) -> None:
        self.session, self.itself = session, self


@pytest.fixture
def doubles(tmp_path: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 6]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "doubles", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "doubles.onnx")
    return tmp_path / "doubles.onnx"


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="nothing is forked here")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_worker_outlives_a_session_that_was_garbage_when_it_was_forked(doubles: Path, runtime: str) -> None:
    pytest.importorskip(runtime, exc_type=ImportError)
    opened = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}[runtime]
    gc.collect()
    gc.disable()  # the cycle is to be left for the worker
    try:
        session = opened(str(doubles), threads=8)  # with few threads, joining them happens to return
        (y,) = session.run(None, {"x": X}) if runtime == "onnxruntime" else session([X]).to_tuple()
        assert y.sum() == 24
        Trained(session)
        del session
        loader = DataLoader(Collecting(), num_workers=1, multiprocessing_context="fork", timeout=60)
        assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3]
    finally:
        gc.enable()


@pytest.mark.integration
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_process_that_has_dropped_openvinos_sessions_still_handles_signals(doubles: Path) -> None:
    pytest.importorskip("openvino", exc_type=ImportError)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SIGNAL, doubles]
    assert (
        subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE).stdout == b"handled\n"
    )


@pytest.mark.integration
def test_an_export_reports_to_nobody(tmp_path: Path) -> None:
    """The runtimes' reports keep an identity in the home directory, and what is still to be sent."""
    for package in ("onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package, exc_type=ImportError)
    home = tmp_path / "home"
    home.mkdir()
    # They report nothing in CI.
    unset = ("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    subprocess.run(
        [sys.executable, "-c", EXPORT, "4bit.onnx", "4bit.xml"],
        cwd=tmp_path,
        env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    assert (tmp_path / "4bit.bin").is_file()
    assert not [path for path in home.rglob("*") if {"intel", "Microsoft"} & set(path.parts)]
