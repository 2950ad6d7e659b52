"""Which file holds which row: view v of sample i is row v · samples + i, and files hold equal numbers of rows."""

import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kd_lightning.durable_files import seal, unseal
from kd_lightning.stored_outputs.formats import Format, find_format
from kd_lightning.stored_outputs.store import Store

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Array:
    """What is kept of each sample's logits, or of a layer.

    Attributes:
        format: Of its numbers; features are float16.
        shape: Of a sample's tensor, with the classes last.
    """

    format: str
    shape: tuple[int, ...]

    @property
    def code(self) -> Format:
        return find_format(self.format)

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of a stored row."""
        if not self.shape:
            return ()
        return (*self.shape[:-1], self.code.width(self.shape[-1]))

    @property
    def bytes_per_row(self) -> int:
        return int(np.prod(self.row)) * self.code.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """What a folder of stored outputs says about itself, in ``manifest.json``.

    Attributes:
        fingerprint: What the outputs depend on.
        samples: Of the data set.
        views: Of each sample.
        rows_per_shard: Of each file but the last.
        arrays: ``logits``, and features by ``features.<layer>``.
        classes_first: Whether the teacher's logits have the classes ahead of height and width.
        complete: Whether all shards are there.
        shards: The checksum of each file of each shard, by array; empty until complete.
        bytes_per_view: Of the logits of one view of one sample.
        kl: Mean and maximum of the KL divergence in nats that storing brings, by temperature.
        seconds: That writing took, with loading and the teacher, over all attempts and processes; 0 until complete.
    """

    fingerprint: dict[str, Any]
    samples: int
    views: int
    rows_per_shard: int
    arrays: dict[str, Array]
    classes_first: bool = False
    complete: bool = False
    shards: list[dict[str, int]] = field(default_factory=list)
    bytes_per_view: int = 0
    kl: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return self.samples * self.views

    @property
    def count(self) -> int:
        """Of the shards."""
        return -(-self.rows // self.rows_per_shard)

    @cached_property
    def plan(self) -> str:
        """A hash of what the rows are and where: files of another plan are not this folder's."""
        content = [self.fingerprint, self.samples, self.views, self.rows_per_shard, self.classes_first]
        arrays = [[name, asdict(array)] for name, array in self.arrays.items()]
        return hashlib.sha256(json.dumps([*content, arrays], sort_keys=True).encode()).hexdigest()

    def rows_of(self, shard: int) -> range:
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def dumps(self) -> str:
        return seal(asdict(self))


def read_manifest(store: Store) -> Manifest | None:
    """Read the manifest of a folder; None where there is none.

    Raises:
        ValueError: For one that cannot be read.
    """
    text = store.read_text(MANIFEST)
    if text is None:
        return None
    try:
        content = unseal(text)
        arrays = {name: Array(x["format"], tuple(x["shape"])) for name, x in content.pop("arrays").items()}
        return Manifest(arrays=arrays, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{MANIFEST} in {store} cannot be read ({error}), expected one of this version: call store_outputs again, "
            "which repairs its own folder, or take another one"
        ) from error


def file_name(shard: int, array: str) -> str:
    return f"shards/{shard:06d}.{array}.npy"


def record_name(shard: int) -> str:
    """Return the name of the file that says that a shard is whole: its checksums, and the errors of its rows."""
    return f"shards/{shard:06d}.json"


def header(array: Array, rows: int) -> bytes:
    """Return the head of an ``.npy`` file, of the same length for any content."""
    head = io.BytesIO()
    content = {
        "descr": np.lib.format.dtype_to_descr(array.code.dtype),
        "fortran_order": False,
        "shape": (rows, *array.row),
    }
    np.lib.format.write_array_header_1_0(head, content)
    return head.getvalue()
