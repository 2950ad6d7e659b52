"""What MLflow loads of a network that was logged: ``mlflow.pyfunc.load_model``, ``mlflow models serve``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_lightning.checkpoint import load_weights
from kd_lightning.export.batches import input_names
from kd_lightning.outputs import run
from kd_lightning.tasks.batch import Batch

WEIGHTS, NETWORK = "final.ckpt", "network.json"


class Served:
    """Answers as an exported file does: from arrays, or one array, to ``{"logits": array}``, at temperature 1."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    @torch.no_grad()
    def predict(self, inputs: Any, params: Any = None) -> dict[str, Any]:
        """Return the logits, (B, ...).

        Args:
            inputs: An array (B, ...), or arrays by the names that an exported file would have for them.
            params: MLflow gives them; there are none.
        """
        given = inputs if isinstance(inputs, Mapping) else {"input": np.asarray(inputs)}
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in given.items()}
        positional = [name for name in tensors if name.removeprefix("input").isdigit() or name == "input"]
        batch = Batch(
            tuple(tensors[name] for name in sorted(positional, key=lambda name: (len(name), name))),
            {name: tensor for name, tensor in tensors.items() if name not in positional},
            None,
        )
        assert set(input_names(batch)) == set(tensors)
        return {"logits": run(self.network, batch.args, batch.kwargs).logits.float().numpy()}


def _load_pyfunc(path: str) -> Served:
    """Make the network from its configuration, and load its weights. MLflow calls it by this name."""
    from hydra.utils import instantiate

    network = instantiate(json.loads((Path(path) / NETWORK).read_text()), _convert_="all")
    load_weights(network, Path(path) / WEIGHTS)
    return Served(network)
