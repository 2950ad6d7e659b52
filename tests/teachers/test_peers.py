"""Networks that learn from each other learn what the paper's formula says, through both front doors."""

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

from kd_lightning import Distillation, DistillationModule, load_student
from kd_lightning.callbacks import HyperparameterSchedule, QuantizationAwareTraining, TemperatureSchedule
from kd_lightning.losses import CATKD, KD, CurriculumTemperature, HardLabel, Hint, SimKD, WKDLogits
from kd_lightning.quantization import QuantizationSpec, set_fake_quantization
from kd_lightning.schedules import linear
from kd_lightning.teachers import Ensemble, Momentum, Peers
from tests.doors import Existing
from tests.tiny import Network, assert_equal, loader, network, samples, sgd, trainer, weights

ROOT = Path(__file__).parents[2]


def networks(count: int = 2, **options: Any) -> dict[str, Network]:
    return {"abc"[i]: network(i, width=8 + i, **options) for i in range(count)}


def mutual(
    count: int = 2, losses: dict[str, Any] | None = None, dropout: float = 0.0, **options: Any
) -> DistillationModule:
    """The student is ``a``, its peers ``b`` and ``c``."""
    terms = losses or {"hard_label": HardLabel(0.5), "kd": KD(2.0)}
    student, *_ = every = networks(count, dropout=dropout)
    return DistillationModule(every.pop(student), Peers(every), terms, options.pop("optimizer", sgd), **options)


def of(module: Any) -> dict[str, nn.Module]:
    return {"a": module.student, **module.teacher.peers}


def fit(module: Any, data: DataLoader | None = None, ckpt_path: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    it = trainer(**options)
    it.fit(module, data or loader(), loader(seed=5), ckpt_path=ckpt_path)
    return it


def by_hand(count: int, steps: int = 4, temperature: float = 2.0) -> dict[str, dict[str, Tensor]]:
    """Each with an optimizer of its own: 0.5·CE + T²·mean over the others of KL(p_l ‖ p_k)."""
    them = networks(count)
    optimizers = {name: sgd(student.parameters()) for name, student in them.items()}
    for (x, y), _ in zip(loader(), range(steps), strict=False):
        logits = {name: student(x) for name, student in them.items()}
        for k, z in logits.items():
            log_q, divergences = (z / temperature).log_softmax(-1), []
            for peer, z_l in logits.items():
                if peer != k:
                    p = (z_l.detach() / temperature).softmax(-1)
                    divergences.append((p * (p.log() - log_q)).sum(-1).mean())
            optimizers[k].zero_grad()
            divergence = temperature**2 * sum(divergences) / len(divergences)
            (0.5 * nn.functional.cross_entropy(z, y) + divergence).backward()
        for optimizer in optimizers.values():
            optimizer.step()
    return {name: weights(student) for name, student in them.items()}


@pytest.mark.parametrize("count", [2, 3])
def test_networks_learn_what_a_hand_written_loop_teaches_them(count: int) -> None:
    module = mutual(count)
    fit(module)
    for name, expected in by_hand(count).items():
        torch.testing.assert_close(weights(of(module)[name]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_so_they_do_under_the_callback_where_the_module_keeps_its_own_loss_for_itself(count: int) -> None:
    every = networks(count)
    module, peers = Existing(every.pop("a"), sgd), Peers(every)
    callback = Distillation(peers, {"hard_label": HardLabel(0.5), "kd": KD(2.0)}, student="net", task_weight=0.0)
    fit(module, callbacks=[callback])
    for name, expected in by_hand(count).items():
        torch.testing.assert_close(
            weights({"a": module.net, **peers.peers}[name]), expected, rtol=1e-4, atol=1e-5, msg=name
        )
    assert not any("distillation" in name for name in module.state_dict())  # the plain module's


def test_what_is_logged(tmp_path: Path) -> None:
    module = mutual(3)
    x, y = samples(32, seed=5)
    done = fit(module, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=2)
    logits = {name: one.eval()(x) for name, one in of(module).items()}
    scored = {"val/acc": logits["a"], "val/teacher_acc/0": logits["b"], "val/teacher_acc/1": logits["c"]}
    scored["val/teacher_acc"] = logits["b"].softmax(-1) + logits["c"].softmax(-1)
    for name, z in scored.items():
        assert done.callback_metrics[name] == pytest.approx((z.argmax(-1) == y).float().mean().item()), name
    logged = done.logged_metrics
    parts = [logged[f"train/loss_weighted/{loss}{peer}"] for loss in ("hard_label", "kd") for peer in ("", "/b", "/c")]
    assert logged["train/loss"] == pytest.approx(sum(parts).item(), rel=1e-5)
    assert logged["train/loss/kd"] != logged["train/loss/kd/b"] != logged["train/loss/kd/c"]
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/teacher_acc/1")
    assert sum(bool(row.split(",")[column]) for row in rows[1:]) == 2  # after each epoch: it learns


def test_each_has_losses_of_its_own_whose_numbers_follow_a_schedule() -> None:
    module = mutual(losses={"hard_label": HardLabel(), "kd": CurriculumTemperature(KD())})
    done = fit(module, callbacks=[HyperparameterSchedule("losses.kd.strength", linear(0.0, 1.0))])
    a, b = module.losses.kd, module.objective.losses_of_peers["b"].kd
    assert (a.strength, b.strength) == (0.75, 0.75)
    assert not torch.equal(a.theta, b.theta)
    optimized = [id(p) for group in done.optimizers[0].param_groups for p in group["params"]]
    assert len(optimized) == len(set(optimized)) == len(list(module.parameters()))


def test_the_temperature_that_is_scheduled_is_that_of_all() -> None:
    module = mutual()
    fit(module, callbacks=[TemperatureSchedule(lambda progress: 3.0)])
    for name, expected in by_hand(2, temperature=3.0).items():
        torch.testing.assert_close(weights(of(module)[name]), expected, rtol=1e-4, atol=1e-5)


def test_unlabelled_samples_are_learnt_from_too() -> None:
    module, none = mutual(losses={"kd": KD()}), DataLoader(samples(32)[0], batch_size=8)
    before = {name: weights(one) for name, one in of(module).items()}
    fit(module, none)
    for name, one in of(module).items():
        assert not torch.equal(one.head.weight, before[name]["head.weight"])


def test_a_peer_is_in_eval_mode_in_validation_and_its_own_parts_stay_as_they_are() -> None:
    module = mutual(dropout=0.5)
    module.teacher.peers["b"].norm.eval()
    running = module.teacher.peers["b"].norm.running_mean.clone()
    done = fit(module, max_epochs=2)
    x, y = samples(32, seed=5)
    expected = (module.teacher.peers["b"].eval()(x).argmax(-1) == y).float().mean().item()
    assert done.callback_metrics["val/teacher_acc"] == pytest.approx(expected)
    assert torch.equal(module.teacher.peers["b"].norm.running_mean, running)


# Checkpoints and processes


@pytest.mark.parametrize("door", ["module", "callback"])
def test_a_resumed_training_gives_bitwise_what_an_uninterrupted_one_gives(tmp_path: Path, door: str) -> None:
    def run(epochs: int, ckpt_path: Any = None) -> tuple[Any, dict[str, Any]]:
        terms = {"hard_label": HardLabel(), "kd": CurriculumTemperature(KD())}
        decay = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
        if door == "module":
            module: Any = mutual(losses=terms, dropout=0.3, scheduler=decay)
            done = fit(module, max_epochs=epochs, ckpt_path=ckpt_path)
            return done, {**weights(module.student), **weights(module.objective)}
        every = networks(dropout=0.3)
        module = Existing(every.pop("a"), sgd)
        callback = Distillation(Peers(every), terms, student="net")
        done = fit(module, max_epochs=epochs, ckpt_path=ckpt_path, callbacks=[callback])
        return done, {**weights(module), **weights(callback.objective)}

    whole = run(2)[1]
    run(1)[0].save_checkpoint(tmp_path / "half.ckpt")
    assert_equal(run(2, tmp_path / "half.ckpt")[1], whole)


@pytest.mark.parametrize("door", ["module", "callback"])
def test_a_checkpoint_is_the_bare_student_and_gives_each_peer_by_its_name(tmp_path: Path, door: str) -> None:
    terms, peers = {"kd": KD(), "hard_label": HardLabel()}, Peers({"b": network(1), "c": network(2)})
    student = network(0)
    if door == "module":
        fit(DistillationModule(student, peers, terms, sgd)).save_checkpoint(tmp_path / "last.ckpt")
    else:
        callback = Distillation(peers, terms, student="net")
        fit(Existing(student, sgd), callbacks=[callback]).save_checkpoint(tmp_path / "last.ckpt")
    for name, one in peers.peers.items():
        plain = network(9)
        plain.load_state_dict(load_student(tmp_path / "last.ckpt", name))
        assert_equal(weights(plain), weights(one))
    bare = load_student(tmp_path / "last.ckpt")
    prefix = "" if door == "module" else "net."
    assert_equal(bare, {prefix + name: value for name, value in weights(student).items()})
    with pytest.raises(ValueError, match=r"last\.ckpt holds no peer 'd', expected one of \['b', 'c'\]"):
        load_student(tmp_path / "last.ckpt", "d")


def test_a_peer_may_be_trained_in_few_bits(tmp_path: Path) -> None:
    module = mutual()
    qat = QuantizationAwareTraining(QuantizationSpec(learned_scales=True), student="objective.peers.b")
    fit(module, callbacks=[qat]).save_checkpoint(tmp_path / "last.ckpt")
    plain, trained = network(5, width=9), module.teacher.peers["b"]
    plain.load_state_dict(load_student(tmp_path / "last.ckpt", "b"))
    x = samples(64)[0]
    assert not torch.equal(plain.eval()(x), trained.eval()(x))
    set_fake_quantization(trained, False)
    assert torch.equal(plain(x), trained(x))


SCRIPT = """
import sys, torch, tests.teachers.test_peers as t
from tests.test_scale_out import data, plain

torch.manual_seed(3)
losses = {"hard_label": t.HardLabel(), "kd": t.KD(2.0)}
student, peers = plain(), t.Peers({"b": t.nn.Linear(6, 4)})
options = {"max_epochs": 3}
if sys.argv[2] == "module":
    module = t.DistillationModule(student, peers, losses, t.sgd)
else:
    module = t.Existing(student, t.sgd)
    options["callbacks"] = [t.Distillation(peers, losses, student="net", task_weight=0.0)]
if len(sys.argv) > 3:
    t.fit(module, data(64), **options)
    rank = "one"
else:
    rank = f"rank{t.fit(module, data(32), devices=2, strategy='ddp', **options).global_rank}"
torch.save({**t.weights(student), **t.weights(peers.peers["b"])}, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.integration
@pytest.mark.parametrize("door", ["module", "callback"])
def test_two_processes_learn_what_one_learns_from_the_whole_batch(tmp_path: Path, door: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for more in ([], ["one"]):
        command = [sys.executable, str(script), str(tmp_path), door, *more]
        subprocess.run(command, check=True, timeout=180, env=environment, cwd=tmp_path)
    zero, one, whole = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("rank0", "rank1", "one"))
    assert_equal(zero, one)
    # The mean of two means rounds otherwise than one mean.
    torch.testing.assert_close(zero, whole, rtol=1e-4, atol=1e-6)


# Refused


@pytest.mark.parametrize("given", [{}, dict.fromkeys("ab", network())])
def test_no_peer_and_one_twice_are_refused(given: dict[str, nn.Module]) -> None:
    with pytest.raises(ValueError, match="expected one or more peers, each a network of its own, got"):
        Peers(given)


def test_a_student_is_no_peer_of_itself() -> None:
    student = network()
    with pytest.raises(ValueError, match="student and teacher are the same network, expected two"):
        DistillationModule(student, Peers({"b": student}), {"kd": KD()}, sgd)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a network \(nn.Module\) as peer 'b', got a Momentum"):
        Peers({"b": Momentum()})


@pytest.mark.parametrize("name", ["b.c", "", "train", 1])
def test_a_name_that_no_module_can_have_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=rf"expected a peer's name to be a word without dots, got {name!r}: rename"):
        Peers({name: network()})


def test_an_average_of_what_still_learns_is_refused() -> None:
    with pytest.raises(ValueError, match="expected teachers that stay as they are, got one that learns"):
        Ensemble([Peers({"b": network()})])


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
        (network(classes=3), loader(), "has 4 classes and the peer 'b' 3"),
        (nn.Sequential(network(), nn.Softmax(-1)), loader(), "expected logits from the peer 'b', got probabilities"),
        (nn.Linear(7, 4), loader(), "the peer 'b' Linear cannot take a batch of shape"),
        (network(), DataLoader(TensorDataset(samples(8)[0], torch.full((8,), 9)), 4), "label 9 is out of range"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(other: nn.Module, data: DataLoader, message: str) -> None:
    module = DistillationModule(network(1), Peers({"b": other}), {"hard_label": HardLabel(), "kd": KD()}, sgd)
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, data)
    assert_equal(weights(module), before)
