"""Students that learn from each other learn what the paper's formula says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import MutualLearning, Teacher, load_student
from kd_lightning.callbacks import HyperparameterSchedule
from kd_lightning.losses import CATKD, KD, CurriculumTemperature, HardLabel, Hint, SimKD, WKDLogits
from kd_lightning.schedules import linear
from tests.tiny import Network, assert_equal, loader, network, samples, sgd, trainer, weights

ROOT = Path(__file__).parents[1]


def students(count: int = 2, **options: Any) -> dict[str, Network]:
    return {"abc"[i]: network(i, width=8 + i, **options) for i in range(count)}


def mutual(
    count: int = 2, losses: dict[str, Any] | None = None, dropout: float = 0.0, **options: Any
) -> MutualLearning:
    terms = losses or {"hard_label": HardLabel(0.5), "kd": KD(2.0)}
    return MutualLearning(students(count, dropout=dropout), terms, options.pop("optimizer", sgd), **options)


def fit(module: MutualLearning, data: DataLoader | None = None, ckpt_path: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    it = trainer(**options)
    it.fit(module, data or loader(), loader(seed=5), ckpt_path=ckpt_path)
    return it


def by_hand(count: int, steps: int = 4) -> dict[str, dict[str, Tensor]]:
    """Each with an optimizer of its own: 0.5·CE + T²·mean over the peers of KL(p_l ‖ p_k), T = 2."""
    them = students(count)
    optimizers = {name: sgd(student.parameters()) for name, student in them.items()}
    for (x, y), _ in zip(loader(), range(steps), strict=False):
        logits = {name: student(x) for name, student in them.items()}
        for k, z in logits.items():
            log_q, divergences = (z / 2).log_softmax(-1), []
            for peer, z_l in logits.items():
                if peer != k:
                    p = (z_l.detach() / 2).softmax(-1)
                    divergences.append((p * (p.log() - log_q)).sum(-1).mean())
            optimizers[k].zero_grad()
            (0.5 * nn.functional.cross_entropy(z, y) + 4 * sum(divergences) / len(divergences)).backward()
        for optimizer in optimizers.values():
            optimizer.step()
    return {name: weights(student) for name, student in them.items()}


@pytest.mark.parametrize("count", [2, 3])
def test_students_learn_what_a_hand_written_loop_teaches_them(count: int) -> None:
    module = mutual(count)
    fit(module)
    for name, expected in by_hand(count).items():
        torch.testing.assert_close(weights(module.students[name]), expected, rtol=1e-4, atol=1e-5)


def test_what_is_logged(tmp_path: Path) -> None:
    module = mutual(3)
    x, y = samples(32, seed=5)
    done = fit(module, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    predicted = {name: student.eval()(x).argmax(-1) for name, student in module.students.items()}
    for name, best in predicted.items():
        assert done.callback_metrics[f"val/acc/{name}"] == pytest.approx((best == y).float().mean().item())
    all_agree = (predicted["a"] == predicted["b"]) & (predicted["a"] == predicted["c"])
    assert done.callback_metrics["val/agreement"] == pytest.approx(all_agree.float().mean().item())
    logged = done.logged_metrics
    for name in "abc":
        term = 0.5 * logged[f"train/loss/{name}/hard_label"] + logged[f"train/loss/{name}/kd"]
        assert logged[f"train/loss/{name}"] == pytest.approx(term.item(), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(sum(logged[f"train/loss/{name}"].item() for name in "abc"), rel=1e-5)


def test_each_student_has_losses_of_its_own_which_can_be_scheduled_and_trained() -> None:
    module = mutual(losses={"hard_label": HardLabel(), "kd": CurriculumTemperature(KD())})
    schedule = HyperparameterSchedule("objectives.a.losses.kd.strength", linear(0.0, 1.0))
    done = fit(module, callbacks=[schedule])
    a, b = (module.objectives[name].losses.kd for name in "ab")
    assert (a.strength, b.strength) == (0.75, 1.0)
    assert not torch.equal(a.theta, b.theta)
    optimized = [id(p) for group in done.optimizers[0].param_groups for p in group["params"]]
    assert len(optimized) == len(set(optimized)) == len(list(module.parameters()))


def test_unlabelled_samples_are_learnt_from_too() -> None:
    module, none = mutual(losses={"kd": KD()}), DataLoader(samples(32)[0], batch_size=8)
    fit(module, none)
    assert not torch.equal(module.students.a.head.weight, students()["a"].head.weight)


# Checkpoints and processes


def test_a_resumed_training_gives_bitwise_what_an_uninterrupted_one_gives(tmp_path: Path) -> None:
    terms = {"hard_label": HardLabel(), "kd": CurriculumTemperature(KD())}
    options = {"losses": terms, "dropout": 0.3, "scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)}
    whole = mutual(**options)
    fit(whole, max_epochs=2)
    half = fit(mutual(**options))
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = mutual(**options)
    fit(resumed, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(resumed), weights(whole))


def test_a_checkpoint_gives_each_student_by_its_name(tmp_path: Path) -> None:
    module = MutualLearning({"a": network(0), "b": network(1)}, {"kd": KD(), "hard_label": HardLabel()}, sgd)
    fit(module).save_checkpoint(tmp_path / "last.ckpt")
    for name, student in module.students.items():
        plain = network(9)
        plain.load_state_dict(load_student(tmp_path / "last.ckpt", name))
        assert_equal(weights(plain), weights(student))
    with pytest.raises(ValueError, match=r"last\.ckpt holds no student 'c', expected one of \['a', 'b'\]"):
        load_student(tmp_path / "last.ckpt", "c")
    # Either would fit: not the first that comes.
    with pytest.raises(ValueError, match=r"holds several students, \['a', 'b'\]: load one"):
        Teacher(network(9), tmp_path / "last.ckpt")


SCRIPT = """
import sys, torch, tests.test_mutual_learning as t
from tests.test_scale_out import data, plain

torch.manual_seed(3)
module = t.MutualLearning({"a": plain(), "b": t.nn.Linear(6, 4)}, {"hard_label": t.HardLabel(), "kd": t.KD(2.0)}, t.sgd)
if len(sys.argv) > 2:
    t.fit(module, data(64), max_epochs=3)
    torch.save(t.weights(module), f"{sys.argv[1]}/one.pt")
else:
    done = t.fit(module, data(32), devices=2, strategy="ddp", max_epochs=3)
    torch.save(t.weights(module), f"{sys.argv[1]}/rank{done.global_rank}.pt")
"""


@pytest.mark.integration
def test_two_processes_learn_what_one_learns_from_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for more in ([], ["one"]):
        command = [sys.executable, str(script), str(tmp_path), *more]
        subprocess.run(command, check=True, timeout=180, env=environment, cwd=tmp_path)
    zero, one, whole = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("rank0", "rank1", "one"))
    assert_equal(zero, one)
    # The mean of two means rounds otherwise than one mean.
    torch.testing.assert_close(zero, whole, rtol=1e-4, atol=1e-6)


# Refused


@pytest.mark.parametrize("given", [{}, {"a": network()}, dict.fromkeys("ab", network())])
def test_fewer_than_two_students_are_refused(given: dict[str, nn.Module]) -> None:
    with pytest.raises(ValueError, match="expected two or more students, each a network of its own, got"):
        MutualLearning(given, {"kd": KD()}, sgd)


@pytest.mark.parametrize("loss", [Hint("act"), SimKD("act"), CATKD("act"), WKDLogits("head")])
def test_losses_that_read_more_than_predictions_are_refused(loss: Any) -> None:
    with pytest.raises(
        ValueError, match=r"losses \['mine'\] read layers or look into a network, expected losses on lo"
    ):
        mutual(losses={"kd": KD(), "mine": loss})


def test_a_loss_has_to_compare_with_the_peer() -> None:
    with pytest.raises(ValueError, match=r"losses \['hard_label'\] compare nothing with a peer"):
        mutual(losses={"hard_label": HardLabel()})


@pytest.mark.parametrize(
    ("other", "data", "message"),
    [
        (network(classes=3), loader(), "has 4 classes and the teacher 3"),
        (nn.Sequential(network(), nn.Softmax(-1)), loader(), "expected logits from the .*, got probabilities"),
        (nn.Linear(7, 4), loader(), "Linear cannot take a batch of shape"),
        (network(), DataLoader(TensorDataset(samples(8)[0], torch.full((8,), 9)), 4), "label 9 is out of range"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(other: nn.Module, data: DataLoader, message: str) -> None:
    module = MutualLearning({"a": network(1), "b": other}, {"hard_label": HardLabel(), "kd": KD()}, sgd)
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, data)
    assert_equal(weights(module), before)
