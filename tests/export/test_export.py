"""A file gives what the network gives, in each format and precision, and says what it is."""

import copy
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_lightning import load_student
from kd_lightning.export import ExportReport, export
from kd_lightning.export.formats import FORMATS
from kd_lightning.export.sessions import openvino_core
from kd_lightning.models import CNN8
from tests.export.networks import images, outputs, quantized, resnet, seeded
from tests.tiny import distillation, loader, network, samples, trainer

onnx, onnxruntime, openvino, _, safetensors, _ = (
    pytest.importorskip(name, exc_type=ImportError)
    for name in ("onnx", "onnxruntime", "openvino", "onnxscript", "safetensors", "safetensors.torch")
)

FLOAT = [(format, precision) for format in FORMATS for precision in ("float32", "float16")]


CLASSES = [f"garment {i}" for i in range(10)]
INPUTS = images()


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return seeded(CNN8, width=24).train()


@pytest.fixture(scope="module")
def reports(student, tmp_path_factory) -> dict[tuple[str, str], ExportReport]:
    """By format and precision, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("exported")
    return {
        (format, precision): export(
            student,
            INPUTS,
            folder / format / precision / f"student{FORMATS[format].suffix}",
            format,
            precision,
            classes=CLASSES,
            mean=(0.286,),
            std=(0.353,),
        )
        for format, precision in FLOAT
    }


@pytest.mark.parametrize(("format", "precision"), FLOAT)
def test_a_file_gives_what_the_network_gives(student, reports, format, precision) -> None:
    report = reports[format, precision]
    expected = copy.deepcopy(student).eval()(INPUTS).detach()
    if format == "state_dict":
        found = safetensors.torch.load_file(report.path)
        assert all(torch.equal(found[name], x.to(found[name].dtype)) for name, x in student.state_dict().items())
        assert found["head.weight"].dtype == getattr(torch, precision)
    else:
        for count in (1, 3, 32):
            got = outputs(report.path, INPUTS[:count])
            torch.testing.assert_close(got, expected[:count], atol=1e-2 if precision == "float16" else 1e-4, rtol=0)
        assert sum(report.operators.values()) > 5
    assert student.training  # it stays as it was
    assert report.agreement == 1
    assert report.max_difference < (1e-2 if precision == "float16" else 1e-4)
    files = list(report.path.parent.iterdir())
    assert {file.stem for file in files} == {"student"}  # nothing temporary is left
    assert report.bytes == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("format", FORMATS)
def test_float16_takes_half_the_room(reports, format) -> None:
    assert reports[format, "float16"].bytes < 0.65 * reports[format, "float32"].bytes


def test_metadata_is_inside_the_file(reports) -> None:
    path = {format: reports[format, "float32"].path for format in FORMATS}
    rt_info = openvino_core().read_model(path["openvino"]).get_rt_info()["kd_lightning"]
    extra = {"metadata.json": ""}
    torch.export.load(path["torch_export"], extra_files=extra)
    with safetensors.safe_open(path["state_dict"], "pt") as file:
        found = [
            {prop.key: prop.value for prop in onnx.load(path["onnx"]).metadata_props},
            {key: value.value for key, value in rt_info.items()},
            json.loads(extra["metadata.json"]),
            file.metadata(),
        ]
    for metadata in found:
        assert metadata["student"] == "CNN8"
        assert metadata["precision"] == "float32"
        assert metadata["temperature"] == "1"
        assert metadata["kd_lightning"]
        assert "processors" not in metadata  # floats are exact enough everywhere
        assert json.loads(metadata["classes"]) == CLASSES
        assert json.loads(metadata["mean"]) == [0.286]
        assert json.loads(metadata["std"]) == [0.353]


def test_neither_paths_nor_samples_leave_with_the_file(reports) -> None:
    model = onnx.load(reports["onnx", "float32"].path)
    assert model.opset_import[0].version == 21
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    with zipfile.ZipFile(reports["torch_export", "float32"].path) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents += [file.read_bytes() for report in reports.values() for file in report.path.parent.iterdir()]
    for content in contents:
        assert INPUTS[0].numpy().tobytes() not in content
        assert os.fsencode(Path(__file__).parents[2]) not in content


def test_a_student_from_a_checkpoint_in_two_lines(tmp_path) -> None:
    module = distillation()
    fitted = trainer(default_root_dir=tmp_path, max_epochs=1)
    fitted.fit(module, loader())
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    fresh, inputs = network(seed=5), samples(32)[0]
    fresh.load_state_dict(load_student(tmp_path / "last.ckpt"))
    export(fresh, inputs, tmp_path / "student.onnx")
    torch.testing.assert_close(
        outputs(tmp_path / "student.onnx", inputs), module.student.eval()(inputs).detach(), atol=1e-4, rtol=0
    )


class Tokens(nn.Module):
    """An object with logits for each token, from arguments with names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 64), nn.Linear(64, 50)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(input_ids) * attention_mask[..., None])}


@pytest.mark.parametrize("precision", ["float32", "float16", "int8_dynamic", "int4"])
def test_inputs_keep_their_names(tmp_path, precision) -> None:
    student = seeded(Tokens)
    tokens = torch.randint(50, (16, 7), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": tokens, "attention_mask": torch.ones(16, 7)}
    report = export(student, example, tmp_path / "s.onnx", precision=precision)
    assert report.agreement >= 0.9
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    feed = {name: x[:5].numpy() for name, x in example.items()}
    expected = student(**example)["logits"][:5].detach()
    (got,) = session.run(None, feed)
    assert (torch.from_numpy(got) - expected).norm() < 0.2 * expected.norm()


class TwoImages(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (left - right).flatten(1)[:, :5]


def test_several_inputs_are_numbered(tmp_path) -> None:
    left, right = images(8), images(9)[1:]
    export(TwoImages(), (left, right), tmp_path / "s.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    (got,) = session.run(None, {"input0": left[:3].numpy(), "input1": right[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(got), TwoImages()(left[:3], right[:3]))


def test_one_sample_does_as_an_example(tmp_path) -> None:
    report = export(TwoImages(), (images(1), images(1)), tmp_path / "s.pt2", "torch_export")
    assert torch.export.load(report.path).module()(INPUTS, INPUTS)[0].shape == (32, 5)


def test_a_compiled_network_has_the_names_and_the_class_that_it_had(tmp_path) -> None:
    compiled = torch.compile(network())
    export(compiled, samples(8)[0], tmp_path / "s.safetensors", "state_dict")
    with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert set(file.keys()) == set(network().state_dict())
        assert file.metadata()["student"] == "Network"


SERVING = """
import json, sys
import numpy as np, onnxruntime
images = np.load(sys.argv[2])

session = onnxruntime.InferenceSession(sys.argv[1])
metadata = session.get_modelmeta().custom_metadata_map
classes, mean, std = (json.loads(metadata[name]) for name in ("classes", "mean", "std"))
inputs = (images / np.float32(255) - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]  # uint8 NCHW
best = session.run(None, {"input": inputs})[0].argmax(1)

print([classes[i] for i in best])
assert not {"torch", "kd_lightning", "onnx"} & set(sys.modules)
"""


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_lines_of_the_readme_serve_it_without_this_package(tmp_path, precision) -> None:
    pixels = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std, classes = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3), [f"class {i}" for i in range(10)]
    inputs = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    student = resnet() if precision == "float32" else quantized(resnet(), inputs)
    export(student, inputs, tmp_path / "s.onnx", precision=precision, classes=classes, mean=mean, std=std)
    np.save(tmp_path / "images.npy", pixels.numpy())
    said = subprocess.run(
        [sys.executable, "-c", SERVING, tmp_path / "s.onnx", tmp_path / "images.npy"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    expected = [classes[i] for i in student.eval()(inputs).argmax(1)]
    assert sum(a == b for a, b in zip(expected, eval(said), strict=True)) >= 31
