"""A data set whose samples bring a teacher's stored outputs along."""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.loaders import View
from kd_lightning.stored_outputs.layout import MANIFEST, Manifest, read_manifest
from kd_lightning.stored_outputs.manifest import check, fingerprint
from kd_lightning.stored_outputs.replay import ReplayedViews
from kd_lightning.stored_outputs.shards import ShardReader, checksum_once, damages
from kd_lightning.stored_outputs.store import Store, file_checksum
from kd_lightning.tasks.batch import Taught
from kd_lightning.teachers import TeacherSource
from kd_lightning.teachers.stored import GLIMPSE, glimpse, inputs_of


class StoredOutputs(Dataset[Any]):
    """A data set with the outputs that :func:`~kd_lightning.stored_outputs.store_outputs` wrote for it.

    A sample is augmented as it was when the teacher saw it. Which of its views comes is up to the epoch: view
    ``epoch % views``. The epoch comes with the key where a loader asks for a
    :class:`~kd_lightning.data.loaders.View`: our data modules' loaders do, and any ``DataLoader`` with
    ``sampler=Views(dataset)``. With plain integers as keys, it is what :meth:`set_epoch` was told.

    Args:
        dataset: The one that was stored, whole and in its order; a ``Subset`` or ``ConcatDataset`` goes around this or
            was inside when the outputs were written.
        path: Where they are; anything that fsspec reaches.
        teacher: Compared with the one that wrote them, where it is at hand.
        cache: Where the files of a remote path are kept on this machine.
        verify: Whether all files are read at the start, at 1 GB/s and more where they are in memory, and compared with
            their checksums; once a process.

    Raises:
        ValueError: For outputs that are not complete, damaged, or of another data set, transform or teacher; names what
            differs.

    Shape: ``logits`` (B, C), float16 or float32; or ``indices`` and ``log_probs`` (B, k); ``features.<layer>``.
    """

    def __init__(
        self,
        dataset: Any,
        path: str | os.PathLike[str],
        *,
        teacher: TeacherSource | torch.nn.Module | None = None,
        cache: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> None:
        self.store = Store(path, cache)
        self.manifest = read_complete(self.store)
        stored = self.manifest.fingerprint
        self.views = ReplayedViews(dataset, stored["seed"])
        check(stored, fingerprint(self.views, self.manifest.views, teacher), self.store)
        self._readers = {name: ShardReader(self.store, self.manifest, name) for name in self.manifest.arrays}
        if verify:
            _check(self.store, self.manifest, checksum_once)
        elif not self.store.remote:
            for reader in self._readers.values():
                for shard in range(self.manifest.count):
                    reader.path(shard)
        # In shared memory: workers that live on from one epoch to the next see the change.
        self._epoch = torch.full((), -1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self.manifest.samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the view for plain integers as keys, for this process and its workers; before the epoch's iterator."""
        self._epoch.fill_(epoch)

    def __getitem__(self, key: View | int) -> Taught:
        chosen, numbers = self._views([key])
        sample = self.views[chosen[0]]
        outputs = _with_glimpse(self._read(numbers), [inputs_of(sample)])
        return Taught(sample, {name: x[0] for name, x in outputs.items()})

    def __getitems__(self, keys: Sequence[View | int]) -> Any:
        """Fetch a batch at once: as samples, or collated as our own data sets give it."""
        chosen, numbers = self._views(keys)
        outputs, fetched = self._read(numbers), self.views.__getitems__(chosen)
        if not isinstance(fetched, list):
            return Taught(fetched, _with_glimpse(outputs, inputs_of(fetched)))
        outputs = _with_glimpse(outputs, [inputs_of(sample) for sample in fetched])
        names, parts = list(outputs), [x.unbind() for x in outputs.values()]
        rows = zip(*parts, strict=True)
        return [Taught(x, dict(zip(names, row, strict=True))) for x, row in zip(fetched, rows, strict=True)]

    def outputs(self, keys: Sequence[View | int]) -> dict[str, Tensor]:
        """Return what was stored for views of samples, without the samples."""
        return self._read(self._views(keys)[1])

    def _read(self, numbers: NDArray[np.int64]) -> dict[str, Tensor]:
        rows = numbers[:, 1] * self.manifest.samples + numbers[:, 0]
        found: dict[str, Tensor] = {}
        for name, reader in self._readers.items():
            taken = reader.take(rows)
            if name != "logits":
                found[name] = torch.from_numpy(taken)
                continue
            found |= reader.code.decode(taken, reader.array.shape[-1])
            if self.manifest.classes_first and "logits" in found:
                found["logits"] = found["logits"].movedim(-1, 1)
        return found

    def _views(self, keys: Sequence[View | int]) -> tuple[Sequence[View], NDArray[np.int64]]:
        """Return which views are meant, also as numbers (B, 2): sample and view."""
        samples, views = self.manifest.samples, self.manifest.views
        if isinstance(keys[0], View):
            # Six times as fast as np.array, which looks at each tuple.
            flat: Iterable[int] = chain.from_iterable(keys)  # type: ignore[arg-type]
            numbers = np.fromiter(flat, np.int64, 2 * len(keys)).reshape(-1, 2)
        else:
            numbers = np.array([(key, self._told()) for key in keys], np.int64)
        largest = numbers.view(np.uint64).max(0)  # negative ones are larger still
        if isinstance(keys[0], View) and largest[0] < samples and largest[1] < views:
            return keys, numbers  # type: ignore[return-value]
        beyond = numbers[(numbers[:, 0] < -samples) | (numbers[:, 0] >= samples), 0]
        if len(beyond):
            raise IndexError(f"expected samples below {samples}, got {beyond[0]}")
        numbers %= (samples, views)
        return [View(*pair) for pair in numbers.tolist()], numbers

    def _told(self) -> int:
        epoch = int(self._epoch)
        if epoch < 0 and self.manifest.views > 1:
            raise ValueError(
                f"{self.manifest.views} views of each sample are stored, and the loader asks for samples without "
                "saying the epoch, which chooses the view: pass DataLoader(..., sampler=Views(dataset)) from "
                "kd_lightning.stored_outputs, or call set_epoch(epoch) ahead of each epoch"
            )
        return max(epoch, 0)


def _with_glimpse(outputs: dict[str, Tensor], inputs: Tensor | Sequence[Tensor | None] | None) -> dict[str, Tensor]:
    """Let :class:`~kd_lightning.teachers.stored.Stored` see whether the inputs are changed on their way."""
    seen = None if inputs is None else glimpse(inputs)
    return outputs if seen is None else {**outputs, f"features.{GLIMPSE}": seen}


def verify(path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Manifest:
    """Read all files and compare their checksums.

    Raises:
        ValueError: Names all files that are missing, torn or changed.
    """
    store = Store(path, cache)
    manifest = read_complete(store)
    if store.remote:
        missing = []
        for shard in range(manifest.count):
            for name in manifest.arrays:
                try:
                    ShardReader(store, manifest, name).path(shard)
                except ValueError as error:
                    missing.append(str(error))
        if missing:
            raise _damaged(store, missing)
    _check(store, manifest, file_checksum)
    return manifest


def _check(store: Store, manifest: Manifest, read: Callable[[Path], int]) -> None:
    found = damages(store, manifest, dict(enumerate(manifest.shards)), read)
    if found:
        raise _damaged(store, [text for shard in sorted(found) for text in found[shard]])


def _damaged(store: Store, texts: Sequence[str]) -> ValueError:
    return ValueError(
        f"{len(texts)} files of {store} are damaged: {'; '.join(texts[:5])}{'; …' * (len(texts) > 5)}: call "
        "store_outputs again, which writes them anew"
    )


def read_complete(store: Store) -> Manifest:
    manifest = read_manifest(store)
    if manifest is None:
        raise ValueError(f"{store} has no {MANIFEST}, expected stored outputs: call store_outputs first")
    if not manifest.complete:
        raise ValueError(
            f"the outputs in {store} are not complete, expected {manifest.count} shards: call store_outputs again with "
            "the same arguments, which goes on where it was cut off"
        )
    return manifest
