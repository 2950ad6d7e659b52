"""Files that torch or safetensors read, without unpickling."""

import copy
import io
import json
from collections.abc import Mapping

import torch
from torch import nn

from kd_lightning.export.batches import Positional, tensors, two
from kd_lightning.export.onnx_graph import cannot_be_written
from kd_lightning.tasks.batch import Batch

METADATA = "metadata.json"


def torch_export_content(
    network: nn.Module, batch: Batch, precision: str, metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """Return the .pt2 file, and the operators in it."""
    dtype = torch.float16 if precision == "float16" else None
    module = Positional(copy.deepcopy(network).to(dtype), batch, dtype=dtype).eval()
    inputs = tensors(two(batch))
    batch_dim = torch.export.Dim("batch")
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=(tuple({0: batch_dim} for _ in inputs),))
    except Exception as error:  # whatever a forward does that cannot be traced
        raise cannot_be_written(network, "torch.export's graph", error) from error
    program.example_inputs = None  # samples of the data set are not to leave with the file; they would be pickled, too
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it tells paths of this machine
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={METADATA: json.dumps(dict(metadata))})
    return stream.getvalue(), [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def state_dict_content(network: nn.Module, precision: str, metadata: Mapping[str, str]) -> bytes:
    """Return the .safetensors file; weights that layers share are stored with each."""
    from safetensors.torch import save

    half = precision == "float16"
    state = {
        name: (x.half() if half and x.is_floating_point() else x).detach().clone().contiguous()
        for name, x in network.state_dict().items()
        if isinstance(x, torch.Tensor)
    }
    return save(state, metadata=dict(metadata))
