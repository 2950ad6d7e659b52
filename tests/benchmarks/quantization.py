"""Quantisation: python tests/benchmarks/quantization.py [runtimes|step|bits|few] [seeds].

`runtimes`: exported int8 / exported fp32, latency and file, and what the runtime computes in integers. `step`: a step
of quantisation-aware training / the same step of distillation. `bits`: test accuracy of a distilled student whose
weights have 8, 4, 3 and 2 bits, activations 8: after training, trained for it on the labels, and trained for it with
distillation, beside the float student with the same further steps; `few`: the same with 300 labelled images.
"""

import copy
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from kd_lightning import DistillationModule
from kd_lightning.callbacks import QuantizationAwareTraining
from kd_lightning.data import FashionMNIST
from kd_lightning.export.batches import as_batch
from kd_lightning.losses import KD, HardLabel, kd
from kd_lightning.losses.base import DistillationLoss
from kd_lightning.models import CNN8, CNN64, CIFARResNet, resnet8x4
from kd_lightning.pipeline.measure import NAMES, OpenFile
from kd_lightning.processor import describe
from kd_lightning.quantization import QuantizationSpec, calibrate, prepare, set_fake_quantization
from kd_lightning.stored_outputs import StoredOutputs, store_outputs
from kd_lightning.teachers.stored import Stored

ROUNDS = 9


def resnet20() -> nn.Module:
    return CIFARResNet(20, (16, 16, 32, 64), 10)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def step() -> None:
    """Interleave steps with and without fake quantisation, with a live teacher and with given logits."""
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], nn.Module | None]] = [
        ("ResNet-20, given logits", resnet20, (3, 32, 32), None),
        ("resnet8x4, given logits", partial(resnet8x4, 10), (3, 32, 32), None),
        ("CNN8, live CNN64", CNN8, (1, 28, 28), CNN64().eval()),
    ]
    for name, make, shape, teacher in cases:
        torch.manual_seed(0)
        networks = [make().train(), make().train()]
        set_fake_quantization(prepare(networks[1]), True)
        x, given = torch.randn(64, *shape), torch.randn(64, 10)
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.01) for network in networks]

        def one(
            network: nn.Module,
            optimizer: torch.optim.Optimizer,
            x: Tensor = x,
            given: Tensor = given,
            teacher: nn.Module | None = teacher,
        ) -> None:
            with torch.no_grad():
                target = given if teacher is None else teacher(x)
            optimizer.zero_grad()
            kd(network(x), target, temperature=4.0).backward()
            optimizer.step()

        ratios = []
        for turn in range(ROUNDS + 2):
            plain, quantized = (
                timed(partial(repeat, partial(one, *pair), 3)) for pair in zip(networks, optimizers, strict=True)
            )
            if turn >= 2:
                ratios.append(quantized / plain)
        print(f"QAT step / distillation step, {name}, batch 64: {spread(ratios)}", flush=True)


@dataclass(frozen=True)
class Setting:
    """Images, and optimizer steps: of the teacher, of the student, and further ones."""

    data: dict[str, Any]
    steps: tuple[int, int, int]


MANY = Setting({"teacher_images": 12000, "labelled": 12000, "share_images": True, "batch_size": 128}, (1410, 1410, 376))
FEW = Setting({"teacher_images": 6000, "labelled": 300}, (1410, 665, 200))


def data(setting: Setting, role: str, seed: int) -> FashionMNIST:
    return FashionMNIST(**setting.data, role=role, seed=seed)


def fit(
    setting: Setting,
    network: nn.Module,
    stored: Callable[[object], object] | None,
    losses: dict[str, DistillationLoss],
    steps: int,
    lr: float,
    seed: int,
    callbacks: tuple[QuantizationAwareTraining, ...] = (),
) -> None:
    seed_everything(seed, verbose=False)
    module = DistillationModule(
        network,
        Stored() if stored is not None else None,
        losses,
        optimizer=partial(torch.optim.Adam, lr=lr),
        scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=lr),
    )
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, callbacks=list(callbacks),
    )  # fmt: skip
    module_data = data(setting, "teacher" if stored is None else "distilled", seed)
    module_data.wrappers = [] if stored is None else [stored]
    trainer.fit(module, module_data)


@torch.no_grad()
def accuracy(network: nn.Module, loader: object) -> float:
    network.eval()
    hits = [(network(x).argmax(1) == y).float() for x, y in loader]  # type: ignore[attr-defined]
    return 100 * float(torch.cat(hits).mean())


def bits(seeds: int, setting: Setting) -> None:
    """Train one teacher and, for each seed, a distilled student; from it all that is compared, with the same steps."""
    test = data(setting, "distilled", 0)
    test.prepare_data()
    test.setup("test")
    teacher = CNN64()
    fit(setting, teacher, None, {"hard_label": HardLabel()}, setting.steps[0], 1e-2, 0)
    print(f"teacher {accuracy(teacher, test.test_dataloader()):.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        test.setup("fit")
        store_outputs(teacher, test.training_set(), folder)
        compare(seeds, setting, partial(StoredOutputs, path=folder, teacher=teacher), test.test_dataloader())


def compare(seeds: int, setting: Setting, stored: Callable[[object], object], test: object) -> None:
    (_, steps, further), lr = setting.steps, 1e-3
    hard: dict[str, DistillationLoss] = {"hard_label": HardLabel()}
    soft: dict[str, DistillationLoss] = {"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=4.0, weight=0.9)}
    rows: dict[str, list[float]] = {}

    def note(name: str, network: nn.Module) -> None:
        rows.setdefault(name, []).append(accuracy(network, test))

    for seed in range(seeds):
        torch.manual_seed(seed)
        student = CNN8()
        fit(setting, student, stored, copy.deepcopy(soft), steps, 1e-2, seed)
        note("float", student)
        for label, losses in (("labels", hard), ("distillation", soft)):
            control = copy.deepcopy(student)
            fit(setting, control, stored, copy.deepcopy(losses), further, lr, seed)
            note(f"float, same further steps, {label}", control)
        for width in (8, 4, 3, 2):
            for observer in ("min_max", "mse"):
                spec = QuantizationSpec(weight_bits=width, observer=observer)  # type: ignore[arg-type]
                quantized = prepare(copy.deepcopy(student), spec)
                loader = data(setting, "distilled", seed)
                loader.prepare_data()
                loader.setup("fit")
                calibrate(quantized, loader.train_dataloader(), batches=8)
                note(f"{width} bits, after training, {observer}", quantized)
            for label, losses in (("labels", hard), ("distillation", soft)):
                trained = copy.deepcopy(student)
                qat = QuantizationAwareTraining(QuantizationSpec(weight_bits=width))
                fit(setting, trained, stored, copy.deepcopy(losses), further, lr, seed, (qat,))
                note(f"{width} bits, trained for it, {label}", trained)
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.1f}" for name, values in rows.items()), flush=True)
    print("\n| student, CNN8 | test accuracy | seeds |\n|---|---|---|")
    for name, values in rows.items():
        sd = statistics.stdev(values) if len(values) > 1 else float("nan")
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {statistics.mean(values):.1f} ± {sd:.1f} | {each} |")


def runtimes() -> None:
    """Export in float and in int8, and time both side by side."""
    from kd_lightning.export import export, integer_operators

    installed = [runtime for runtime in NAMES if find_spec(runtime)]
    for runtime in NAMES.keys() - installed:
        print(f"{NAMES[runtime]} is left out: it is not installed (pip install 'kd-lightning[{runtime}]')", flush=True)
    print(f"target={QuantizationSpec().target!r}, on a processor with {describe()}", flush=True)
    for name, make in (("ResNet-20", resnet20), ("resnet8x4", partial(resnet8x4, 10))):
        torch.manual_seed(0)
        network = make().train()
        batches = [torch.randn(64, 3, 32, 32) for _ in range(8)]
        for x in batches:
            network(x)  # for batch norm
        network.eval()
        with tempfile.TemporaryDirectory() as folder:
            paths = {kind: Path(folder, f"{kind}.onnx") for kind in ("float", "int8")}
            export(network, batches[0][:2], paths["float"])
            quantized = calibrate(prepare(copy.deepcopy(network)), [(x, torch.zeros(64)) for x in batches])
            export(quantized, batches[0][:2], paths["int8"], precision="int8")
            sizes = {kind: path.stat().st_size for kind, path in paths.items()}
            print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters; file int8 / float "
                  f"{sizes['int8'] / sizes['float']:.2f}; {integer_operators(paths['int8'])}")  # fmt: skip
            for runtime in installed:
                files = {kind: OpenFile(path, runtime) for kind, path in paths.items()}
                for size in (1, 64):
                    batch = as_batch(torch.randn(size, 3, 32, 32))
                    calls = {kind: partial(file.run, file.feed(batch)) for kind, file in files.items()}
                    repeats, ratios = 100 if size == 1 else 5, []
                    for turn in range(ROUNDS + 1):
                        ms = {
                            kind: 1e3 * timed(partial(repeat, call, repeats)) / repeats for kind, call in calls.items()
                        }
                        if turn:
                            ratios.append(ms["int8"] / ms["float"])
                    figures = f"{spread(ratios)}, {ms['int8']:.2f} ms against {ms['float']:.2f} ms"
                    print(f"{name}, {runtime}, batch {size}: int8 / float {figures}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    parts = [part for part in sys.argv[1:] if not part.isdigit()] or ["runtimes", "step", "bits", "few"]
    seeds = next((int(part) for part in sys.argv[1:] if part.isdigit()), 3)
    if "runtimes" in parts:
        runtimes()
    if "step" in parts:
        step()
    if "bits" in parts:
        bits(seeds, MANY)
    if "few" in parts:
        bits(seeds, FEW)
