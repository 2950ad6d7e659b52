"""What distilling a language model costs: python -m tests.benchmarks.language_models [rounds].

Steps through the Trainer of the student of the Shakespeare experiments, taught live, from stored outputs (whole, or
the 20 best of 79) and on texts of its own, over a step of the student alone. Before that, what storing takes and loses:
bytes and KL divergence a token, tokens a second, of an untrained teacher whose distributions are as sharp as a trained
one's.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_lightning import DistillationModule, Teacher
from kd_lightning.callbacks import OnPolicy
from kd_lightning.data import ShakespeareText
from kd_lightning.data.loaders import shuffled
from kd_lightning.losses import KD, HardLabel
from kd_lightning.models import GPT
from kd_lightning.stored_outputs import StoredOutputs, store_outputs
from kd_lightning.tasks import LanguageModelling
from kd_lightning.teachers import Stored, TeacherSource
from tests.benchmarks.stored_outputs import Steps

ENTROPY = 1.7  # bits a character
STEPS, BATCH = 20, 16


class Sharpened(nn.Module):
    """An untrained network whose distributions have the entropy of a trained one's."""

    def __init__(self, network: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.network, self.factor = network.eval(), 1.0
        low, high = 1.0, 1000.0
        for _ in range(30):
            self.factor = (low * high) ** 0.5
            log_p = torch.log_softmax(self(tokens), -1)
            entropy = float(-(log_p.exp() * log_p).sum(-1).mean()) / 0.6931
            low, high = (self.factor, high) if entropy > ENTROPY else (low, self.factor)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.network(tokens)
        return logits


def fit(teacher: TeacherSource | None, loader: DataLoader[Any], callbacks: list[Callback]) -> float:
    torch.manual_seed(0)
    losses: Any = {"hard_label": HardLabel()} if teacher is None else {"kd": KD(1.0)}
    module = DistillationModule(
        GPT(),
        teacher,
        losses,
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        task=LanguageModelling(per="character"),
        check_teacher=False,
    )
    times = Steps()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS + 3,
        callbacks=[times, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return times.median_round(2)


def main(rounds: int) -> None:
    data = ShakespeareText(batch_size=BATCH)
    plain = data.training_set()
    torch.manual_seed(0)
    network = Sharpened(GPT(layers=3, width=128), plain.__getitems__(range(16))[0])
    with tempfile.TemporaryDirectory() as temporary:
        stored = {}
        for format in ("float16", "uint8", "top20"):
            folder, start = Path(temporary) / format, time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()) as said:
                store_outputs(network, plain, folder, format=format, batch_size=128, task=LanguageModelling())
            tokens, size = len(plain) * plain.length, sum(file.stat().st_size for file in folder.rglob("*.npy"))
            rate = tokens / (time.perf_counter() - start)
            stored[format] = StoredOutputs(plain, folder)
            error = said.getvalue().strip().rpartition("MB; ")[2]
            print(f"{format}: {size / tokens:.1f} bytes a token, {rate:,.0f} tokens a second with the teacher; {error}")

        ways: dict[str, Callable[[], float]] = {
            "the student alone": lambda: fit(None, shuffled(plain, BATCH, 0), []),
            "a live teacher": lambda: fit(Teacher(network), shuffled(plain, BATCH, 0), []),
            "stored, float16": lambda: fit(Stored(), shuffled(stored["float16"], BATCH, 0), []),
            "stored, 20 best": lambda: fit(Stored(), shuffled(stored["top20"], BATCH, 0), []),
            "on-policy, each batch": lambda: fit(Teacher(network), shuffled(plain, BATCH, 0), [OnPolicy(1.0)]),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(way())
    alone = times["the student alone"]
    print(f"a step of the student alone, {BATCH} × 128 characters: {statistics.median(alone) * 1e3:.0f} ms")
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, alone, strict=True)]
        print(f"{name} / the student alone: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
