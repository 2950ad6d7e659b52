"""Write each format, and read it back."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.export.batches import tensors
from kd_lightning.export.files import write
from kd_lightning.export.integer_operators import integer_operators
from kd_lightning.export.onnx_files import onnx_content
from kd_lightning.export.openvino_files import openvino_contents
from kd_lightning.export.sessions import Session, open_session, openvino_core
from kd_lightning.export.torch_files import state_dict_content, torch_export_content
from kd_lightning.outputs import run
from kd_lightning.quantization import spec_of
from kd_lightning.tasks.batch import Batch


class Job(NamedTuple):
    """What is to be written.

    Attributes:
        network: On the CPU, in eval mode.
        batch: Of real inputs.
        file: Where it is written at first; has the name it is to have.
        path: What it is to become.
    """

    network: nn.Module
    batch: Batch
    precision: str
    metadata: Mapping[str, str]
    file: Path
    path: Path


class Written(NamedTuple):
    """A file that is there.

    Attributes:
        session: Runs it.
        operators: How many of each kind.
        layers: Names of their outputs in the file, where the runtime gives these.
    """

    session: Session
    operators: Mapping[str, int] = {}
    layers: Mapping[str, str] = {}


def _onnx(job: Job) -> Written:
    import onnx

    content, layers = onnx_content(job.network, job.batch, job.precision, job.metadata)
    write(job.file, content, job.path)
    if job.precision == "int8" and spec_of(job.network).activation_bits is not None:
        found = integer_operators(job.file)
        if not found.integer:
            raise ValueError(
                f"{job.path.name} would run nothing in int8, expected integer operators in ONNX Runtime, got {found}: "
                "see quantized_layers(network) for what stays in float, and why"
            )
    operators = Counter(node.op_type for node in onnx.load_from_string(content).graph.node)
    return Written(open_session(job.file, "onnxruntime"), operators, layers)


def _openvino(job: Job) -> Written:
    contents, layers = openvino_contents(job.network, job.batch, job.precision, job.metadata, job.path.name)
    for name, content in contents.items():
        write(job.file.with_name(name), content, job.path.with_name(name))
    found = openvino_core().read_model(str(job.file)).get_ops()
    plumbing = ("Constant", "Parameter", "Result")
    operators = Counter(op.get_type_name() for op in found if op.get_type_name() not in plumbing)
    return Written(open_session(job.file, "openvino"), operators, layers)


def _torch_export(job: Job) -> Written:
    content, operators = torch_export_content(job.network, job.batch, job.precision, job.metadata)
    write(job.file, content, job.path)
    module = torch.export.load(job.file).module()
    return Written(lambda batch: list(module(*tensors(batch))), Counter(operators))


def _state_dict(job: Job) -> Written:
    from safetensors.torch import load_file

    write(job.file, state_dict_content(job.network, job.precision, job.metadata), job.path)
    network = copy.deepcopy(job.network)
    network.load_state_dict(load_file(job.file), strict=False)  # extra state is no tensor

    def session(batch: Batch) -> list[Tensor]:
        return [run(network, batch.args, batch.kwargs).logits]

    return Written(session)


WRITERS: Mapping[str, Callable[[Job], Written]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch_export": _torch_export,
    "state_dict": _state_dict,
}
