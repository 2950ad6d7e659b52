"""Run a teacher over a data set's augmented views once, and keep its outputs."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from kd_lightning.data.loaders import View
from kd_lightning.durable_files import is_json
from kd_lightning.outputs import class_dim, classes_last
from kd_lightning.preflight import check_logits
from kd_lightning.stored_outputs.formats import Rows, find_format, kl_errors
from kd_lightning.stored_outputs.layout import MANIFEST, Array, Manifest, read_manifest, record_name
from kd_lightning.stored_outputs.manifest import check, fingerprint
from kd_lightning.stored_outputs.progress import Progress, errors_of, summary
from kd_lightning.stored_outputs.replay import ReplayedViews
from kd_lightning.stored_outputs.shards import ShardWriter, checksum_once, damages, read_record, record_of
from kd_lightning.stored_outputs.store import Store, locked
from kd_lightning.tasks import Task
from kd_lightning.teachers import Teacher, TeacherSource


def store_outputs(
    teacher: TeacherSource | nn.Module,
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    views: int = 1,
    format: str = "uint8",
    layers: Sequence[str] = (),
    batch_size: int = 256,
    seed: int = 0,
    task: Task | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    shard_bytes: int = 2**30,
    commit_seconds: float = 10.0,
) -> Manifest:
    """Write a teacher's outputs for each sample and view, for :class:`~kd_lightning.stored_outputs.StoredOutputs`.

    Call it again with the same arguments after it was cut off: it goes on where it was, and the files become those of
    an uninterrupted run, but for the seconds that are noted in them. What is there is read and compared with its
    checksums; a damaged file is named and written anew. Prints progress, and at the end the size and the error.

    Args:
        teacher: A network that returns logits, or a source.
        dataset: Map-style, with the augmentation that the student will see; a data module's ``training_set()``, say.
        path: A folder, or whatever address fsspec reaches.
        views: Augmented views of each sample; epoch e of a training sees view ``e % views``.
        format: ``float16``, ``uint8`` (a byte a class), or ``top<k>`` such as ``top10``.
        layers: The teacher's layers whose outputs are kept, as float16.
        batch_size: Of the teacher.
        seed: Of the augmentation. A data set that takes ``View`` keys augments by its own.
        task: Reads batches; classification unless given.
        collate_fn: As the student's loader has it.
        num_workers: Processes that load and augment.
        device: To move the teacher to; it stays where it is unless given.
        rank: Of this process among those that write; as ``torch.distributed`` has it unless given.
        world_size: How many processes write; each must be called.
        shard_bytes: Size at which a file ends, of all arrays together.
        commit_seconds: How often what was written is made to outlast a power cut, and progress is printed.

    Returns:
        The manifest; not complete where other processes are still writing.

    Raises:
        ValueError: For a folder with outputs of something else (what differs is named), augmentation that cannot be
            replayed, a teacher that gives probabilities or is not finite, and samples of different shapes.
        RuntimeError: When another process writes the same shard.
        OSError: For a full disk; before the first batch where it can be known.
    """
    source = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
    rank, world_size = _place(rank, world_size)
    code = find_format(format)
    if views < 1 or batch_size < 1 or not len(dataset):
        raise ValueError(
            f"expected a view, a batch size and a sample or more, got {views}, {batch_size} and {len(dataset)}"
        )
    if device is not None:
        source.to(torch.device(device))
    replayed, store, run = ReplayedViews(dataset, seed), Store(path), _Run(source, task or Task(), layers)
    loader = _Loader(replayed, batch_size, collate_fn, num_workers)
    now = fingerprint(replayed, views, source, format=format, layers=list(layers))
    manifest = _manifest_or_none(store)
    if manifest is None:
        first, raw = next(loader.batches(0, min(batch_size, len(dataset)), len(dataset)))
        plan = _plan(run, run(raw, first), now, len(dataset), views, format, shard_bytes, world_size)
        store.create_text(MANIFEST, plan.dumps())
        manifest = read_manifest(store)
        assert manifest is not None
    check(manifest.fingerprint, now, store)

    todo = _unwritten(store, manifest, range(rank, manifest.count, world_size))
    _check_space(store, manifest, todo)
    progress = Progress(
        sum(len(manifest.rows_of(k)) for k in todo), f" (rank {rank} of {world_size})" if world_size > 1 else ""
    )
    for shard in todo:
        with ShardWriter(store, manifest, shard) as writer:
            if record_of(store, manifest, shard) is not None:
                continue  # another process has finished it in the meantime
            try:
                _write_shard(writer, manifest, loader, run, code.dense, progress, commit_seconds)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror}: while writing shard {shard} of {store}, {progress.done:,} of "
                    f"{progress.total:,} views; make room and call store_outputs again, which goes on from there",
                ) from error
    return _finish(store, manifest, rank, world_size)


def _manifest_or_none(store: Store) -> Manifest | None:
    """Read the manifest, if there is one; a damaged one is removed: of this plan or not, each shard says itself.

    Raises:
        ValueError: For a manifest of another program or version.
    """
    try:
        return read_manifest(store)
    except ValueError as error:
        text = store.read_text(MANIFEST) or ""
        if is_json(text) and '"sha256"' not in text:
            raise
        print(f"{error}: it is written anew", flush=True)
        store.remove(MANIFEST)
        return None


def _unwritten(store: Store, manifest: Manifest, shards: Iterable[int]) -> list[int]:
    """Return which shards are not there, or damaged; says which files are."""
    if store.remote:  # where no file is read, but for its length
        return [shard for shard in shards if record_of(store, manifest, shard) is None]
    records = {shard: read_record(store, manifest, shard) for shard in shards}
    checksums = {shard: record["checksums"] for shard, record in records.items() if record is not None}
    found = damages(store, manifest, checksums, checksum_once)
    for shard, record in records.items():
        if record is None and store.size(record_name(shard)) is not None:
            found[shard] = [f"{record_name(shard)} in {store} is damaged, or of other outputs"]
    for shard, texts in found.items():
        print(f"{'; '.join(texts)}: written anew", flush=True)
        store.remove(record_name(shard))
    return [shard for shard, record in records.items() if record is None or shard in found]


class _Run:
    """The teacher's outputs for a batch, as float32 on the CPU, by the names under which they are stored."""

    def __init__(self, source: TeacherSource, task: Task, layers: Sequence[str]) -> None:
        self.source, self.task, self.layers = source, task, tuple(layers)
        self.classes_first = False

    def __call__(self, raw: Any, samples: Sequence[View]) -> dict[str, Tensor]:
        network = self.source.network
        parameter = next(network.parameters(), None) if network is not None else None
        batch = self.task.read(raw)
        if parameter is not None:
            batch = move_data_to_device(batch, parameter.device)
        outputs = self.source(batch, self.layers)
        logits = self.task.arrange(outputs.logits)
        self.classes_first = class_dim(logits) != -1 or (self.task.class_dim == 1 and outputs.logits.ndim == 3)
        found = {"logits": classes_last(logits)}
        found |= {f"features.{name}": outputs.features[name] for name in self.layers}
        for name, x in found.items():
            finite = x.isfinite().reshape(len(x), -1).all(-1)
            if len(x) != len(samples) or not bool(finite.all()):
                wrong = [key.sample for key, good in zip(samples, finite.tolist(), strict=False) if not good]
                raise ValueError(
                    f"the teacher's {name} {tuple(x.shape)} hold NaN or infinity for samples {wrong[:5]}, expected "
                    f"finite numbers for each of {len(samples)} samples: look for broken inputs or weights"
                )
        # Encoded where they are: of a large vocabulary the best classes are a thousandth of what would be moved.
        return {name: _in_float(x) for name, x in found.items()}


def _in_float(x: Tensor) -> Tensor:
    x = x.detach().float().contiguous()
    return x.cpu() if x.device.type == "mps" else x  # which has no double precision


class _Loader:
    """Batches of consecutive rows; where they begin depends on the shard alone, so that a resumed run cuts alike."""

    def __init__(
        self, views: ReplayedViews, batch_size: int, collate_fn: Callable[[list[Any]], Any] | None, workers: int
    ) -> None:
        self.views, self.batch_size, self.workers = views, batch_size, workers
        self.collate: Callable[[Any], Any] = _as_is if views.batched else (collate_fn or default_collate)

    def batches(self, start: int, stop: int, samples: int) -> Iterator[tuple[list[View], Any]]:
        loader: DataLoader[Any] = DataLoader(
            self.views,
            batch_sampler=_Chunks(start, stop, samples, self.batch_size),
            collate_fn=self.collate,
            num_workers=self.workers,
            generator=torch.Generator(),  # nothing is drawn from the global one
        )
        return zip(_Chunks(start, stop, samples, self.batch_size), loader, strict=True)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    start: int
    stop: int
    samples: int
    size: int

    def __iter__(self) -> Iterator[list[View]]:
        at = self.start
        while at < self.stop:
            view, sample = divmod(at, self.samples)
            count = min(self.size, self.stop - at, self.samples - sample)
            yield [View(sample + i, view) for i in range(count)]
            at += count


def _write_shard(
    writer: ShardWriter,
    manifest: Manifest,
    loader: _Loader,
    run: _Run,
    dense: Callable[[Rows, int], Tensor],
    progress: Progress,
    commit_seconds: float,
) -> None:
    rows = manifest.rows_of(writer.shard)
    progress.add(writer.rows)
    last = time.monotonic()
    for keys, raw in loader.batches(rows.start + writer.rows, rows.stop, manifest.samples):
        outputs = run(raw, keys)
        encoded: dict[str, NDArray[Any]] = {}
        for name, array in manifest.arrays.items():
            if tuple(outputs[name].shape[1:]) != array.shape:
                raise ValueError(
                    f"the teacher's {name} are {tuple(outputs[name].shape[1:])} for samples {keys[0].sample} to "
                    f"{keys[-1].sample}, expected {array.shape} as for the first: pad all samples to one length"
                )
            encoded[name] = array.code.encode(outputs[name])
        logits = outputs["logits"]
        errors = kl_errors(logits, dense(encoded["logits"], logits.shape[-1]).to(logits.device))
        writer.tally[0] += errors[0].numel()
        for i, error in enumerate(errors):
            writer.tally[1 + 2 * i] += float(error.sum())
            writer.tally[2 + 2 * i] = max(writer.tally[2 + 2 * i], float(error.max()))
        writer.append(encoded)
        progress.add(len(keys))
        if time.monotonic() - last >= commit_seconds:
            writer.commit()
            last = time.monotonic()
        progress.print(commit_seconds)
    writer.finish()


def _plan(
    run: _Run,
    outputs: dict[str, Tensor],
    now: dict[str, Any],
    samples: int,
    views: int,
    format: str,
    shard_bytes: int,
    world_size: int,
) -> Manifest:
    check_logits("teacher", outputs["logits"])
    arrays = {name: Array(format if name == "logits" else "float16", tuple(x.shape[1:])) for name, x in outputs.items()}
    bytes_per_row = sum(array.bytes_per_row for array in arrays.values())
    rows = min(max(shard_bytes // bytes_per_row, 1), -(-samples * views // world_size))
    return Manifest(now, samples, views, rows, arrays, run.classes_first, bytes_per_view=arrays["logits"].bytes_per_row)


def _check_space(store: Store, manifest: Manifest, todo: Sequence[int]) -> None:
    rows = sum(len(manifest.rows_of(shard)) for shard in todo)
    needed, free = rows * sum(array.bytes_per_row for array in manifest.arrays.values()), store.free_bytes()
    if free is not None and needed > free:
        raise OSError(
            f"{store} needs {needed / 1e9:.2f} GB for {rows:,} views and has {free / 1e9:.2f} GB free: make room, take "
            "another folder, fewer views, or a smaller format (uint8, top<k>)"
        )


def _finish(store: Store, manifest: Manifest, rank: int, world_size: int) -> Manifest:
    """Complete the manifest as soon as all shards are there, whichever process sees that."""
    together = world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()
    if together:
        torch.distributed.barrier()
    records = [record_of(store, manifest, shard) for shard in range(manifest.count)]
    found = [record for record in records if record is not None]
    if len(found) == manifest.count:
        whole = dataclasses.replace(
            manifest,
            complete=True,
            shards=[record["checksums"] for record in found],
            kl=errors_of([record["tally"] for record in found]),
            seconds=sum(record.get("seconds", 0.0) for record in found),
        )
        with locked(store.local / "finishing.lock", wait=True):
            if whole != manifest:
                store.write_text(MANIFEST, whole.dumps())
            store.tidy()
        if rank == 0 or not together:
            print(summary(whole), flush=True)
        manifest = whole
    if together:
        torch.distributed.barrier()
    return manifest


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (rank is None) != (world_size is None):
        raise ValueError(f"expected rank and world_size together, got {rank} and {world_size}")
    if rank is None or world_size is None:
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"expected rank 0 to {world_size - 1}, got {rank}")
    return rank, world_size


def _as_is(batch: Any) -> Any:
    return batch
