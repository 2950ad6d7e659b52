"""What cannot be written is said with the remedy, and leaves nothing behind."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd_lightning.export import export, formats, onnx_files
from kd_lightning.quantization import prepare
from tests.export.networks import images, quantized, resnet, seeded

for package in ("onnx", "onnxruntime", "onnxscript", "openvino", "safetensors"):
    pytest.importorskip(package, exc_type=ImportError)
INPUTS = images()


def test_an_unknown_format_precision_or_suffix(tmp_path) -> None:
    path = tmp_path / "s.onnx"
    with pytest.raises(ValueError, match=r"expected format to be one of onnx, openvino, .*, got 'tflite'"):
        export(seeded(), INPUTS, path, "tflite")
    with pytest.raises(ValueError, match="be one of float32, float16 in torch_export, got 'int8'"):
        export(seeded(), INPUTS, path, "torch_export", "int8")
    with pytest.raises(ValueError, match=r"expected a path that ends in \.xml for format='openvino', got 's\.onnx'"):
        export(seeded(), INPUTS, path, "openvino")


def test_a_share_in_percent(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected least_agreement to be a share, from 0 to 1, got 99"):
        export(seeded(), INPUTS, tmp_path / "s.onnx", least_agreement=99)


def test_weights_that_an_onnx_file_cannot_hold(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_files, "_MOST_BYTES", 20_000)
    for format, path in (("onnx", "s.onnx"), ("openvino", "s.xml")):
        with pytest.raises(ValueError, match=r"CNN8 has weights of .* GB, expected less than .*: take form"):
            export(seeded(), INPUTS, tmp_path / path, format)
    export(seeded(), INPUTS, tmp_path / "s.onnx", precision="float16")


def test_a_runtime_that_is_missing_names_its_extra(tmp_path, monkeypatch) -> None:
    real = formats.find_spec
    missing = {"openvino", "nncf", "safetensors", "onnxscript"}
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name in missing else real(name))
    for format, suffix, extra in (
        ("onnx", "onnx", "onnx"),
        ("openvino", "xml", "openvino"),
        ("state_dict", "safetensors", "safetensors"),
    ):
        with pytest.raises(ImportError, match=rf"expects the packages .*: pip install 'kd-lightning\[{extra}\]'"):
            export(seeded(), INPUTS, tmp_path / f"s.{suffix}", format)
    missing -= {"openvino", "onnxscript"}
    with pytest.raises(ImportError, match=r"int4 .* name nncf: pip install 'kd-lightning\[openvino-int4\]'"):
        export(seeded(), INPUTS, tmp_path / "s.xml", "openvino", "int4")


def test_a_path_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/s\.onnx cannot be written: expected a folder in which files can be made"):
        export(seeded(), INPUTS, tmp_path / "file" / "s.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match="expected the path of a file, got the folder"):
        export(seeded(), INPUTS, tmp_path / "folder.onnx")


DISK_FULL = """
import pathlib, resource, sys
from torch import nn
from kd_lightning.export import export
from tests.export.networks import images

folder, student = pathlib.Path(sys.argv[1]), nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
real = pathlib.Path.open

def full(path, *args, **kwargs):  # not before: the packages' own temporary files are whole
    if path.parent.parent == folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, most))
    return real(path, *args, **kwargs)

for name, format in zip(sys.argv[2:], ("onnx", "openvino", "torch_export", "state_dict")):
    (folder / name).write_text("old")
    pathlib.Path.open = full
    try:
        export(student, images(), folder / name, format)
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    pathlib.Path.open = real
"""


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path) -> None:
    names = ["s.onnx", "s.xml", "s.pt2", "s.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DISK_FULL, tmp_path, *names]
    said = subprocess.run(command, check=True, timeout=300, env=environment, stdout=subprocess.PIPE, text=True).stdout
    for name in ("s.onnx", "s.bin", "s.pt2", "s.safetensors"):
        assert f"{name} has not been written: expected room for 0.03" in said
    assert said.count("File too large; make room and export again") == 4
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(names, "old")


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x.squeeze(1))


@pytest.mark.parametrize(
    ("network", "format", "got"),
    [
        (Decides(), "onnx", "got: .*data-dependent"),
        (Decides(), "torch_export", "got: .*data-dependent"),
        (Eigenvalues(), "onnx", "got: .*No ONNX function found for <.*eigh"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, network, format, got) -> None:
    path = tmp_path / f"s{formats.FORMATS[format].suffix}"
    with pytest.raises(ValueError, match=f"{type(network).__name__} cannot be written as .*: expected oper.*{got}"):
        export(network, INPUTS, path, format)
    assert not list(tmp_path.iterdir())


def test_a_network_is_prepared_for_its_precision(tmp_path) -> None:
    path = tmp_path / "s.onnx"
    with pytest.raises(ValueError, match="expected a prepared and calibrated network for int8, got CNN8 in float"):
        export(seeded(), INPUTS, path, precision="int8")
    with pytest.raises(ValueError, match="ranges have seen no data"):
        export(prepare(seeded()), INPUTS, path, precision="int8")
    for bits, own, got in ((8, "int8", "float32"), (8, "int8", "int4"), (4, "int4", "int8")):
        network = quantized(seeded(), INPUTS, weight_bits=bits)
        with pytest.raises(ValueError, match=f"weights of {bits} bits, expected precision='{own}', got '{got}'"):
            export(network, INPUTS, path, precision=got)


def test_an_int8_file_that_would_run_nothing_on_integers(tmp_path) -> None:
    network = quantized(nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.Flatten()), INPUTS)
    with pytest.raises(ValueError, match=r"s.onnx would run nothing in int8, .* in floats: 1 ConvTranspose: see quant"):
        export(network, INPUTS, tmp_path / "s.onnx", precision="int8")
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_numbers(tmp_path) -> None:
    network, inputs = seeded(), INPUTS.clone()
    inputs[3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="CNN8 gives logits that are infinite or not a number for 1 of 32 samples"):
        export(network, inputs, tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [slice(None), slice(3, 5)])
def test_an_example_that_is_no_number(tmp_path, bad) -> None:
    inputs = INPUTS.clone()
    inputs[bad] = float("nan")
    count = len(inputs[bad])
    for network, precision in ((seeded(), "float32"), (quantized(seeded(), INPUTS), "int8")):
        with pytest.raises(ValueError, match=f"expected numbers in the example, got NaN in {count} of 32 samples"):
            export(network, inputs, tmp_path / "s.onnx", precision=precision)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.3,), (0,), r"expected std above 0, got \[0\]: whoever serves the file divides by it"),
        ((0.3,), (-1.0,), r"expected std above 0, got \[-1.0\]"),
        ((0.3,), (), "mean and std of the same channels, got 1 and 0 numbers: pass both, or neither"),
        ((), (0.3,), "mean and std of the same channels, got 0 and 1 numbers: pass both, or neither"),
        ((0.3, 0.3, 0.3), (1, 1), "mean and std of the same channels, got 3 and 2 numbers"),
        ((0.3,) * 3, (1,) * 3, r"one for each channel, got 3 for inputs of shape \(32, 1, 28, 28\): pass those of th"),
        ((float("nan"),), (1,), r"expected mean to hold finite numbers, got \[nan\]: compute it again"),
        ((0.3,), (float("inf"),), r"expected std to hold finite numbers, got \[inf\]"),
    ],
)
def test_inputs_cannot_have_been_normalised_so(tmp_path, mean, std, message) -> None:
    with pytest.raises(ValueError, match=message):
        export(seeded(), INPUTS, tmp_path / "s.onnx", mean=mean, std=std)
    assert not list(tmp_path.iterdir())


def test_a_file_for_other_processors_than_this_one_says_so(tmp_path, monkeypatch) -> None:
    network = quantized(seeded(), INPUTS, target="vnni")
    wrong = -network.eval()(INPUTS).detach()
    monkeypatch.setattr("kd_lightning.export.to_file.in_two_batches", lambda session, batch: wrong)
    monkeypatch.setattr("kd_lightning.processor.instructions", lambda: {"avx2"})
    with pytest.raises(
        ValueError,
        match=r"; expected 98.0%\. Nothing was written: target='vnni' is exact on x86 with VNNI or AMX, and th",
    ):
        export(network, INPUTS, tmp_path / "s.onnx", precision="int8")


def test_an_example_or_names_that_do_not_fit(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"one sample at least, the same number for each input, got \[0\]"):
        export(seeded(), INPUTS[:0], tmp_path / "s.onnx")
    with pytest.raises(ValueError, match="an exported file expects tensors alone, got Tensor, bool"):
        export(seeded(), (INPUTS, True), tmp_path / "s.onnx")
    with pytest.raises(ValueError, match="expected names of 10 classes, one for each logit, got 2"):
        export(seeded(), INPUTS, tmp_path / "s.onnx", classes=["a", "b"])


def test_a_file_that_disagrees_is_not_kept_and_the_worst_layer_named(tmp_path) -> None:
    network = resnet()
    with torch.no_grad():  # one large weight a channel: the others of the channel become 0 in 4 bits
        network.layer2[0].conv2.weight[:, 0, 0, 0] = 20 * network.layer2[0].conv2.weight.abs().max()
        network(images(32, 3, 32))  # batch statistics as of this network
    (tmp_path / "s.onnx").write_text("old")
    with pytest.raises(
        ValueError, match=r"s.onnx in int4 agrees with CIFARResNet on .* expected 99.9%; .* 'layer2.0.\w+2'"
    ):
        export(network, images(32, 3, 32), tmp_path / "s.onnx", precision="int4", least_agreement=0.999)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_the_worst_layer_is_found_in_openvino_too(tmp_path) -> None:
    pytest.importorskip("nncf", exc_type=ImportError)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        network[1].weight[:, ::16] *= 50  # one large weight in each group: the others of the group become 0
    with pytest.raises(ValueError, match=r"s.xml in int4 .*; expected 100.0%; it departs most at layer '1'"):
        export(network, images(256), tmp_path / "s.xml", "openvino", "int4", least_agreement=1.0)
    assert not list(tmp_path.iterdir())


def test_values_beyond_16_bits_are_found_where_they_begin(tmp_path) -> None:
    network = seeded()
    with torch.no_grad():
        network.block2[0].weight.mul_(1e6)
        network.block2[1].running_mean.mul_(1e6)
        network.block2[1].running_var.mul_(1e12)
        network.block2[1].eps = 0.0
    with pytest.raises(ValueError, match=r"in float16 .* no numbers is 'block2.\d'. Nothing was written"):
        export(network, INPUTS, tmp_path / "s.onnx", precision="float16")


def test_nothing_in_a_pt2_file_is_pickled(tmp_path) -> None:
    export(seeded(), INPUTS, tmp_path / "s.pt2", "torch_export")
    with zipfile.ZipFile(tmp_path / "s.pt2") as archive:
        pickled = [info for info in archive.infolist() if info.filename.endswith((".pt", ".pkl")) and info.file_size]
    assert not pickled
