"""The step that is tried before training: it leaves no trace in the module, and needs no second copy of its weights."""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torchmetrics import MeanMetric

from kd_lightning import Distillation
from kd_lightning.losses import KD
from tests.tiny import Network, assert_equal, good_teacher, loader, network, trainer, weights


class Busy(LightningModule):
    """Somebody's module, whose step changes all that a step can change."""

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.net, self.average, self.failing = Network(dropout=0.5), network(3), failing
        self.codes = nn.Embedding(8, 6, max_norm=0.1)
        self.register_buffer("queue", torch.zeros(16, 6))
        self.register_buffer("position", torch.tensor(0), persistent=False)
        self.seen, self.count, self.names, self.moving = MeanMetric(), 0, [], torch.zeros(3)
        self.cache: dict[str, Any] = {"nested": {"losses": []}}
        self.calls = 0
        self.net.head.register_forward_hook(self.counted)

    def counted(self, *_: Any) -> None:
        self.calls += 1

    def setup(self, stage: str) -> None:
        nn.init.constant_(self.net.head.bias, 0.25)
        self.made_in_setup = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.failing == "first":
            nn.init.zeros_(self.net.stem.weight)
            raise KeyError("the user's")
        self.count += 1
        self.names.append(batch_idx)
        self.cache["nested"]["losses"].append(self.count)
        self.moving += 1
        self.queue[int(self.position) % 16] = x[0] + torch.randn(6)
        self.position += 1
        x = x + self.codes(torch.randint(8, (len(x),))) + np.random.rand() + random.random()
        loss = F.cross_entropy(self.net(x), y)
        self.seen.update(loss.detach())
        for average, parameter in zip(self.average.parameters(), self.net.parameters(), strict=True):
            average.data.mul_(0.9).add_(parameter.data, alpha=0.1)
        self.net.stem.weight.data = self.net.stem.weight.data.clamp(-0.01, 0.01)
        loss.backward(retain_graph=True)
        self.net.stem.requires_grad_(False).eval()
        if self.failing == "later":
            raise KeyError("the user's")
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Look(Callback):
    """Everything there is to see of a module, at the end of its turn in ``setup``."""

    def setup(self, trainer, pl_module, stage):
        plain = {name: value for name, value in vars(pl_module).items() if not name.startswith("_")}
        self.found = copy.deepcopy(
            {
                "weights": weights(pl_module),
                "buffers": dict(pl_module.named_buffers()),
                "memory": {name: p.data_ptr() for name, p in pl_module.named_parameters()},
                "trained": {name: p.requires_grad for name, p in pl_module.named_parameters()},
                "versions": {name: p._version for name, p in pl_module.named_parameters()},
                "modes": {name: part.training for name, part in pl_module.named_modules()},
                "hooks": {name: len(part._forward_hooks) for name, part in pl_module.named_modules()},
                "attributes": {name: value for name, value in plain.items() if not callable(value)},
                "metric": pl_module.seen.metric_state,
                "generators": (torch.get_rng_state(), np.random.get_state()[1], random.getstate()),
                "gradients": [p.grad for p in pl_module.parameters()],
            }
        )


def look_around(module: LightningModule, error: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    before, after = Look(), Look()
    distillation = Distillation(good_teacher(), {"kd": KD()}, "net")  # makes no projector, which draws its weights

    class Last(Callback):
        def setup(self, trainer, pl_module, stage):
            raise StopIteration  # the callback takes back what it has hung on the module

    with pytest.raises(error or StopIteration):
        trainer(callbacks=[before, distillation, Last()]).fit(module, loader())
    after.setup(None, module, "fit")
    return before.found, after.found


@pytest.mark.parametrize("failing", ["", "later", "first"])
def test_the_module_is_as_it_was_bit_by_bit(failing: str) -> None:
    before, after = look_around(Busy(failing), ValueError if failing == "first" else None)
    assert before["attributes"].pop("moving").equal(after["attributes"].pop("moving"))
    for part in ("attributes", "memory", "trained", "versions", "modes", "hooks"):
        assert before[part] == after[part], part
    for part in ("weights", "buffers", "metric"):
        assert_equal(before[part], after[part])
    assert before["gradients"] == after["gradients"] == [None] * len(before["gradients"])
    assert all(np.array_equal(x, y) for x, y in zip(*(f["generators"][:2] for f in (before, after)), strict=True))
    assert before["generators"][2] == after["generators"][2]
    assert before["attributes"]["cache"] == {"nested": {"losses": []}}


def test_a_training_begins_with_the_weights_that_the_module_has() -> None:
    module = Busy()
    module.net.load_state_dict(network().state_dict())
    first: list[Any] = []

    class Notes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            first.append(weights(pl_module.net))
            raise KeyError

    callback = Distillation(good_teacher(), {"kd": KD()}, "net")
    with pytest.raises(KeyError):
        trainer(callbacks=[callback, Notes()]).fit(module, loader(128))
    expected = weights(network())
    expected["head.bias"].fill_(0.25)
    assert_equal(first[0], expected)


MEMORY = """
import sys, torch
import torch.nn.functional as F
from torch import nn
from lightning.pytorch import LightningModule
from kd_lightning import Distillation
from kd_lightning.losses import KD
from tests.tiny import good_teacher, loader, trainer

class Large(LightningModule):
    def __init__(self, frozen, width):
        super().__init__()
        body = nn.Sequential(nn.Linear(6, width), *(nn.Linear(width, width) for _ in range(6)))
        self.net = nn.Sequential(body.requires_grad_(not frozen), nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-6)

def now(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) / 1024

def fit(width):
    how, frozen = sys.argv[1], sys.argv[2] == "frozen"
    callbacks = [Distillation(good_teacher(), {"kd": KD()}, "net")] if how == "distilled" else []
    trainer(callbacks=callbacks, max_steps=1).fit(Large(frozen, width), loader(128))

fit(8)  # what is imported on the way is there then
before = now("VmRSS:")
fit(4096)  # 400 MB
print("peak", now("VmHWM:") - before)
"""


def peak(how: str, which: str) -> float:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, how, which],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("which", ["frozen", "trained"])
def test_a_large_student_needs_the_memory_of_a_plain_step(which: str) -> None:
    plain, distilled = peak("plain", which), peak("distilled", which)
    print(f"{which}: {plain:.0f} MB plain, {distilled:.0f} MB distilled: {distilled / plain:.3f}")
    assert distilled <= 1.1 * plain
