"""What a file says about itself."""

import importlib.metadata
import json
import math
from collections.abc import Sequence

from torch import nn

from kd_lightning.export.batches import tensors
from kd_lightning.quantization import is_prepared, spec_of
from kd_lightning.tasks.batch import Batch


def metadata_of(
    network: nn.Module, precision: str, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> dict[str, str]:
    """Return strings; lists are JSON."""
    lists = {
        "classes": [str(name) for name in classes],
        "mean": [float(x) for x in mean],
        "std": [float(x) for x in std],
    }
    return {
        "student": type(network).__name__,
        "precision": precision,
        "temperature": "1",
        "kd_lightning": importlib.metadata.version("kd-lightning"),
        **{name: json.dumps(values) for name, values in lists.items()},
        **_integers(network, precision),
    }


def check_normalisation(mean: Sequence[float], std: Sequence[float], batch: Batch | None = None) -> None:
    """Raise ValueError for a mean and a standard deviation by which inputs cannot have been normalised.

    Args:
        mean: One number for each channel, or one for all.
        std: Likewise.
        batch: Inputs, whose second or last dimension is the channels.
    """
    for name, values in (("mean", mean), ("std", std)):
        if not all(math.isfinite(x) for x in values):
            raise ValueError(f"expected {name} to hold finite numbers, got {list(values)}: compute it again")
    if len(mean) != len(std):
        raise ValueError(
            f"expected mean and std of the same channels, got {len(mean)} and {len(std)} numbers: pass both, or neither"
        )
    if any(x <= 0 for x in std):
        raise ValueError(
            f"expected std above 0, got {list(std)}: whoever serves the file divides by it; a channel that is constant "
            "takes 1"
        )
    shape = tensors(batch)[0].shape if batch is not None else ()
    if len(mean) > 1 and batch is not None and len(mean) not in (*shape[1:2], *shape[-1:]):
        raise ValueError(
            f"expected mean and std of one number, or one for each channel, got {len(mean)} for inputs of shape "
            f"{tuple(shape)}: pass those of these inputs"
        )


def _integers(network: nn.Module, precision: str) -> dict[str, str]:
    """Say where sums of the file's integers are exact, and the range that its weights use."""
    if is_prepared(network):
        spec = spec_of(network)
        return {"processors": spec.processors, "weight_range": json.dumps([-spec.weight_max, spec.weight_max])}
    if precision == "int8_dynamic":
        return {"processors": "any processor", "weight_range": json.dumps([-64, 64])}
    return {}
