"""What stored teacher outputs cost to read, to write and to keep: python tests/benchmarks/stored_outputs.py [part ...].

Parts: read, check, formats, tokens, replay, growth, step; all of them unless named. Files are in a temporary folder and
in the system's cache. Ratios are medians of rounds that alternate in one process, with the lowest and the highest.
"""

import contextlib
import io
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning import DistillationModule
from kd_lightning.data.in_memory import CropAndFlip, InMemory
from kd_lightning.data.loaders import View, shuffled
from kd_lightning.losses import KD, HardLabel
from kd_lightning.models import resnet8x4
from kd_lightning.stored_outputs import StoredOutputs, store_outputs, verify
from kd_lightning.stored_outputs.formats import find_format, kl_errors
from kd_lightning.stored_outputs.replay import ReplayedViews
from kd_lightning.stored_outputs.shards import ShardReader
from kd_lightning.teachers.stored import Stored
from kd_lightning.tracking import MLFlowLogger

FORMATS = ("float16", "uint8", "top10")
BATCH = 64


class Logits(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are their own logits, for a teacher that costs nothing: spread of 2, and 8 more for one class."""

    def __init__(self, count: int, classes: int) -> None:
        self.count, generator = count, torch.Generator().manual_seed(0)
        self.pool = 2 * torch.randn(4096, classes, generator=generator)
        self.pool[torch.arange(4096), torch.randint(classes, (4096,), generator=generator)] += 8

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: View | int) -> tuple[Tensor, Tensor]:
        inputs, target = self.__getitems__([key])
        return inputs[0], target[0]

    def __getitems__(self, keys: Sequence[View | int]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([key.sample if isinstance(key, View) else key for key in keys]) % len(self.pool)
        return self.pool[ids], torch.zeros(len(ids), dtype=torch.int64)


def quietly(*args: object, **options: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        store_outputs(*args, **options)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    one: Callable[[], object], other: Callable[[], object], rounds: int, calls: int
) -> tuple[str, float, float]:
    """Return the ratio with its range, and both medians in seconds.

    A round is so many calls of each, in turn, and their medians: what else the machine does falls on few of them.
    """
    seconds(one), seconds(other)
    pairs = []
    for _ in range(rounds):
        times = [(seconds(one), seconds(other)) for _ in range(calls)]
        pairs.append(tuple(statistics.median(column) for column in zip(*times, strict=True)))
    ratios = [a / b for a, b in pairs]
    text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return text, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def read(folder: Path) -> None:
    print(
        f"read of a batch of {BATCH}, from row numbers, or from a loader's keys, to tensors / one fancy index on a "
        "numpy memmap of the same logits"
    )
    for classes in (100, 1000):
        dataset, count = Logits(20_000, classes), 20_000
        generator = np.random.default_rng(0)
        keys = [[View(int(i), 0) for i in generator.integers(0, count, BATCH)] for _ in range(64)]
        rows = [np.array([key.sample for key in batch]) for batch in keys]
        plain = {}
        for dtype in (np.float16, np.float32):
            plain[dtype] = np.lib.format.open_memmap(
                folder / f"{classes}{dtype.__name__}.npy", "w+", dtype, (count, classes)
            )
            plain[dtype][:] = dataset.pool[torch.arange(count) % 4096].numpy()
        for name in FORMATS:
            quietly(nn.Identity(), dataset, folder / f"{name}{classes}", format=name, batch_size=1000)
            stored = StoredOutputs(dataset, folder / f"{name}{classes}")
            for dtype in (np.float16, np.float32):

                def from_rows(
                    reader: ShardReader = stored._readers["logits"], rows: list = rows, classes: int = classes
                ) -> None:
                    for batch in rows:
                        reader.code.decode(reader.take(batch), classes)

                def from_keys(stored: StoredOutputs = stored, keys: list = keys) -> None:
                    for batch in keys:
                        stored.outputs(batch)

                def theirs(memmap: np.ndarray = plain[dtype], rows: list = rows) -> None:
                    for batch in rows:
                        memmap[batch]

                for title, ours in (("rows", from_rows), ("keys", from_keys)):
                    ratio, a, b = alternate(ours, theirs, rounds=11, calls=15)
                    times = f"{a / 64 * 1e6:5.1f} / {b / 64 * 1e6:4.1f} µs"
                    what = f"{BATCH} × {classes:<5} {name:8} {title} / {dtype.__name__} memmap"
                    print(f"  {what}  {ratio}  {times}", flush=True)


def check(folder: Path) -> None:
    """How fast the checksums of all files are compared, which an opening does once a process."""
    quietly(
        nn.Identity(), Logits(300_000, 1000), folder / "checked", format="uint8", batch_size=4096, shard_bytes=2**26
    )
    gigabytes, rates = sum(file.stat().st_size for file in (folder / "checked").rglob("*.npy")) / 1e9, []
    for _ in range(5):
        busy, start = time.process_time(), time.perf_counter()
        verify(folder / "checked")
        rates.append((gigabytes / (time.perf_counter() - start), gigabytes / (time.process_time() - busy)))
    wall, cpu = (max(column) for column in zip(*rates, strict=True))
    print(f"check: {gigabytes:.2f} GB at {wall:.2f} GB/s, {cpu:.2f} GB for each second of a core")


def formats(_: Path) -> None:
    print("bytes of a sample's view at C = 1,000, and KL from float32 in nats, mean (maximum) of 4,096 rows")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4096, 1000, generator=generator)
    label = nn.functional.one_hot(torch.randint(1000, (4096,), generator=generator), 1000)
    for title, x in (
        ("spread 1, label +8", noise + 8 * label),
        ("spread 2, label +8", 2 * noise + 8 * label),
        ("spread 2, no label", 2 * noise),
        ("spread 3, no label", 3 * noise),
        ("spread 5, no label", 5 * noise),
    ):
        for name in (*FORMATS, "top100"):
            code = find_format(name)
            stored = code.encode(x)
            errors = [f"{e.mean():.1e} ({e.max():.1e})" for e in kl_errors(x, code.dense(stored, 1000))]
            print(f"  {title}  {name:8} {stored[0].nbytes:5,} B   T = 1: {errors[0]}   T = 4: {errors[1]}", flush=True)


def tokens(_: Path) -> None:
    print("the 20 best tokens: bytes a token, tokens encoded and decoded a second")
    for vocabulary in (32_768, 50_257, 128_256, 151_936):
        code, x = find_format("top20"), torch.randn(256, vocabulary, generator=torch.Generator().manual_seed(0))
        stored = code.encode(x)
        many = np.tile(stored, (64, 1))
        writing = len(x) / min(seconds(lambda c=code, x=x: c.encode(x)) for _ in range(3))
        reading = len(many) / min(seconds(lambda c=code, m=many, v=vocabulary: c.decode(m, v)) for _ in range(3))
        print(f"  V = {vocabulary:7,}: {stored[0].nbytes} B, {writing:,.0f} and {reading:,.0f} a second", flush=True)
    print("KL from float32 in nats at T = 1, V = 151,936, the r-th best token's probability a power of r")
    ranks = torch.arange(1, 151_937).double()
    for power in (3.0, 2.0, 1.7, 1.5, 1.3, 1.2):
        x = (-power * ranks.log()).float()[None]
        p = x.double().softmax(-1)
        for name in ("top20", "top50", "top100"):
            code = find_format(name)
            kl = float(kl_errors(x, code.dense(code.encode(x), x.shape[-1]))[0])
            rest = 1 - float(p[0, : int(name[3:])].sum())
            entropy = float(-(p * p.log()).sum())
            print(f"  r^-{power}: entropy {entropy:.2f}, {name:6} leaves {rest:.4f}, KL {kl:.1e}", flush=True)


class Nothing(Dataset[int]):
    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> int:
        return index


def replay(_: Path) -> None:
    plain, views = Nothing(), ReplayedViews(Nothing(), 0)
    keys = [View(i, 0) for i in range(BATCH)]

    def naive() -> None:
        for key in keys:
            states = torch.get_rng_state(), random.getstate(), np.random.get_state()
            torch.manual_seed(key.sample)
            random.seed(key.sample)
            np.random.seed(key.sample)
            plain[key.sample]
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])

    ratio, ours, theirs = alternate(lambda: views.__getitems__(keys), naive, rounds=11, calls=10)
    print(
        f"replay: {ours / BATCH * 1e6:.1f} µs a sample / {theirs / BATCH * 1e6:.1f} µs with all three generators "
        f"seeded and restored for each: {ratio}",
        flush=True,
    )


def growth(folder: Path) -> None:
    classes, batch = 100, 10_000
    print(f"uint8, {classes} classes: writing with a teacher that costs nothing, and reading {BATCH} random views")
    reads, rate = {}, 0.0
    for count in (10**4, 10**5, 10**6):
        path = folder / f"growth{count}"
        start = time.perf_counter()
        quietly(nn.Identity(), Logits(count, classes), path, batch_size=batch)
        rate = count / (time.perf_counter() - start)
        stored = StoredOutputs(Logits(count, classes), path)
        generator = np.random.default_rng(0)
        keys = [[View(int(i), 0) for i in generator.integers(0, count, BATCH)] for _ in range(256)]
        size = sum(file.stat().st_size for file in path.rglob("*.npy"))
        reads[count] = (stored, keys)
        print(f"  {count:9,} samples: {rate:,.0f} views a second on one core, {size / 1e6:.1f} MB", flush=True)
    times: dict[int, list[float]] = {count: [] for count in reads}
    for _ in range(12):
        for count, (stored, keys) in reads.items():
            start = time.perf_counter()
            for batch_keys in keys:
                stored.__getitems__(batch_keys)
            times[count].append((time.perf_counter() - start) / len(keys))
    for count, values in times.items():
        low, high = min(values[1:]) * 1e6, max(values[1:]) * 1e6
        print(f"  {count:9,} samples: {statistics.median(values[1:]) * 1e6:.1f} µs a batch ({low:.1f} to {high:.1f})")
    thousand = Logits(20_000, 1000)
    start = time.perf_counter()
    quietly(nn.Identity(), thousand, folder / "thousand", batch_size=1000)
    slow = 20_000 / (time.perf_counter() - start)
    for c, r in ((classes, rate), (1000, slow)):
        hours, size = 1e10 / r / 3600, 1e10 * find_format("uint8").width(c)
        print(
            f"  10⁹ samples × 10 views at {c} classes: {size / 1e12:.2f} TB, {r:,.0f} views a second and "
            f"core: {hours:,.0f} core hours beside the teacher's own, so {hours / 24:.0f} writing ranks for a day",
            flush=True,
        )


class BareStudent(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student = resnet8x4()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.student(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.parameters())


def optimizer(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def distilled() -> DistillationModule:
    losses = {"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=4.0, weight=0.9)}
    return DistillationModule(resnet8x4(), Stored(), losses, optimizer, check_teacher=False)


class Steps(Callback):
    """Times from the end of one step to the end of the next: loading, the step, and what Lightning does around it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())

    def median_round(self, warm_up: int) -> float:
        ends = self.ends[warm_up:]
        return (ends[-1] - ends[0]) / (len(ends) - 1)


def fit(module: LightningModule, loader: DataLoader, logger: object, steps: int) -> float:
    times = Steps()
    Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps + 3,
        max_epochs=-1,
        callbacks=[times],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)
    return times.median_round(2)


def step(folder: Path, rounds: int = 5, steps: int = 50, batch: int = 16) -> None:
    count = 1024
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = generator.integers(0, 100, count)

    def training() -> InMemory:
        return InMemory(images, labels, [0.5] * 3, [0.25] * 3, CropAndFlip(count, 0))

    # Who wrote the outputs is nothing to the student's step.
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 100))
    quietly(teacher, training(), folder / "step", views=2)
    stored = StoredOutputs(training(), folder / "step")
    loggers = [MLFlowLogger(tracking_uri=f"sqlite:///{folder}/{name}.db") for name in ("ours", "bare")]
    pairs = []
    for _ in range(rounds):
        ours = fit(distilled(), shuffled(stored, batch, 0), loggers[0], steps)
        bare = fit(BareStudent(), shuffled(training(), batch, 0), loggers[1], steps)
        pairs.append((ours, bare))
        print(f"  {ours * 1e3:.1f} / {bare * 1e3:.1f} ms", flush=True)
    ratios = [a / b for a, b in pairs]
    print(
        f"step through Lightning with stored outputs (uint8, 2 views, {batch} CIFAR-sized images, resnet8x4, MLflow) / "
        f"the bare student's: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"{statistics.median(b for _, b in pairs) * 1e3:.1f} ms a bare step",
        flush=True,
    )


PARTS = {
    "read": read,
    "check": check,
    "formats": formats,
    "tokens": tokens,
    "replay": replay,
    "growth": growth,
    "step": step,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as temporary:
            PARTS[part](Path(temporary))
