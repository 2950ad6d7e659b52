"""A file gives on a processor without VNNI what the fake-quantised network gives; with 8-bit weights it does not.

The other processor is emulated: qemu-x86_64, of Debian's package qemu-user.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_lightning.export import export
from kd_lightning.models import CNN8, MLP32
from tests.export.networks import images, quantized, seeded

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, exc_type=ImportError)
pytestmark = pytest.mark.integration
QEMU = shutil.which("qemu-x86_64")
# Areas that are dark or bright, so that the products that are added in a pair are large together.
INPUTS = (images(64, size=7) > 0).float().repeat_interleave(4, 2).repeat_interleave(4, 3) * (1 - 0.1 * images(64).abs())

SERVE = """
import sys
import numpy as np, onnxruntime

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads, settings.log_severity_level = 1, 3
inputs = np.load(sys.argv[1])
for path in sys.argv[2:]:
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    np.save(path + ".npy", session.run(None, {"input": inputs})[0])
"""


def one_sided(make: type[nn.Module]) -> nn.Module:
    """A network whose channels have large weights of one sign, so that its sums are as large as they can be."""
    network = seeded(make)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                sign = torch.where(torch.arange(len(module.weight)) % 2 == 0, 1.0, -1.0)
                size = module.weight.abs() + 2 * module.weight.abs().max()
                module.weight.copy_(size * sign.reshape(-1, *[1] * (module.weight.ndim - 1)))
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        network.train()(INPUTS)  # batch statistics as of these weights
    return network.eval()


def served_by_haswell(folder: Path, *paths: Path) -> list[Tensor]:
    np.save(folder / "inputs.npy", INPUTS.numpy())
    command = [QEMU, "-cpu", "Haswell", sys.executable, "-c", SERVE, folder / "inputs.npy", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [torch.from_numpy(np.load(f"{path}.npy")) for path in paths]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def agreement(got: Tensor, expected: Tensor) -> float:
    return float((got.argmax(1) == expected.argmax(1)).float().mean())


@pytest.mark.skipif(QEMU is None, reason="expected qemu-x86_64, of Debian's package qemu-user")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs x86 packages")
def test_seven_bits_are_exact_without_vnni_and_eight_are_not(tmp_path: Path) -> None:
    expected, paths = {}, {}
    for target in ("any", "vnni"):
        network = quantized(one_sided(CNN8), INPUTS, target=target)
        expected[target] = network(INPUTS).detach()
        # The file is right where it is for: on a machine without VNNI it is compared with the wrong processor here.
        least = 0.98 if target == "any" else 0.0
        report = export(network, INPUTS, tmp_path / f"{target}.onnx", precision="int8", least_agreement=least)
        paths[target] = report.path
    dynamic = one_sided(MLP32)
    paths["dynamic"] = export(dynamic, INPUTS, tmp_path / "dynamic.onnx", precision="int8_dynamic").path
    expected["dynamic"] = dynamic(INPUTS).detach()
    found = dict(zip(paths, served_by_haswell(tmp_path, *paths.values()), strict=True))
    for name in ("any", "dynamic"):
        assert error(found[name], expected[name]) < 0.02
        assert agreement(found[name], expected[name]) >= 0.98
    assert error(found["vnni"], expected["vnni"]) > 0.2
    assert agreement(found["vnni"], expected["vnni"]) < 0.9


FAKE = """
import sys
import torch
from kd_lightning.models import CNN8
from tests.export.networks import quantized
from tests.export.test_other_processors import INPUTS, one_sided

torch.save(quantized(one_sided(CNN8), INPUTS)(INPUTS).detach(), sys.argv[1])
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_fake_quantised_network_is_the_same_with_fewer_instructions(tmp_path: Path, capability: str) -> None:
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "ONEDNN_MAX_CPU_ISA": "SSE41" if capability == "default" else "AVX2",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", FAKE, tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert platform.machine() != "x86_64" or done.stdout.strip() == capability.upper()
    got = torch.load(tmp_path / "logits.pt")
    assert error(got, quantized(one_sided(CNN8), INPUTS)(INPUTS).detach()) < 0.02
