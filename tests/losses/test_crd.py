import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Distillation, Outputs
from kd_lightning.data import WithIds
from kd_lightning.losses import CRD, crd
from kd_lightning.outputs import Samples
from tests.losses.reference import numerical_gradient, wave
from tests.tiny import assert_equal, distillation, good_teacher, loader, network, samples, sgd, trainer, weights

TOTAL = 11
STUDENT, TEACHER = wave((4, 3), 0.37, 0.2), wave((4, 5), 0.53, 0.9)
IDS, LABELS = torch.tensor([7, 0, 4, 10]), torch.tensor([2, 0, 2, 1])


def outputs(feature: Tensor, ids: Tensor | None = None, total: int = TOTAL) -> Outputs:
    known = None if ids is None else Samples(ids, total)
    return Outputs(torch.zeros(len(feature), 2, dtype=feature.dtype), {"layer": feature}, known)


def built(**options: object) -> CRD:
    torch.manual_seed(0)
    loss = CRD("layer", **{"feature_dim": 6, "negatives": 20, "tau": 0.5, **options})
    loss.build(outputs(STUDENT, IDS), outputs(TEACHER))
    return loss.double()


def prepared(**options: object) -> CRD:
    """With banks, labels and normalisers as in the middle of a training."""
    loss = built(**options)
    loss.student_bank.copy_(unit(wave((TOTAL, 6), 0.71, 0.3)))
    loss.teacher_bank.copy_(unit(wave((TOTAL, 6), 0.59, 0.6)))
    loss.labels.copy_(torch.tensor([0, 1, 2, 0, 2, -1, 0, 2, 1, -1, 1]))
    loss.log_z.copy_(torch.tensor([2.5, 3.1]))
    loss.step.fill_(3)
    return loss


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def embeddings(loss: CRD, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    s, t = loss.student_projector, loss.teacher_projector
    return unit(student @ s.weight.T + s.bias).detach(), unit(teacher @ t.weight.T + t.bias).detach()


def nce(positive: float, negatives: list[float], z: float, k: int, n: int) -> float:
    """As the formula is written: probabilities, and K times the mean over the negatives."""

    def h(score: float) -> float:
        return (math.exp(score) / z) / (math.exp(score) / z + k / n)

    mean = sum(math.log(1 - h(score)) for score in negatives) / len(negatives) if negatives else 0.0
    return -math.log(h(positive)) - k * mean


def crd_by_loops(
    loss: CRD, student: Tensor, teacher: Tensor, labels: list[int], others=range(TOTAL), ids=None, z=None
) -> float:
    total, bank_labels = 0.0, loss.labels.tolist()
    ids = IDS.tolist() if ids is None else ids
    z = loss.log_z.exp().tolist() if z is None else z
    for anchors, bank, z_side in zip(
        embeddings(loss, student, teacher), (loss.teacher_bank, loss.student_bank), z, strict=True
    ):
        for anchor, own, label in zip(anchors, ids, labels, strict=True):
            scores = [math.fsum((anchor * entry).tolist()) / loss.tau for entry in bank]
            negatives = [scores[j] for j in others if j != own and not (label >= 0 and bank_labels[j] == label)]
            total += nce(scores[own], negatives, z_side, loss.negatives, TOTAL)
    return total / len(ids)


# The formula


def test_function_equals_the_formula_in_value_and_gradient() -> None:
    positive, negatives = wave((3,), 0.7, 0.2), wave((3, 4), 0.9, 0.4)
    allowed = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()

    def by_loops(positive: Tensor, negatives: Tensor) -> float:
        rows = [row[keep].tolist() for row, keep in zip(negatives, allowed, strict=True)]
        return sum(nce(p, row, math.exp(1.3), 7, 50) for p, row in zip(positive.tolist(), rows, strict=True)) / 3

    leaves = positive.clone().requires_grad_(), negatives.clone().requires_grad_()
    loss = crd(*leaves, allowed, count=7, total=50, log_z=1.3)
    loss.backward()
    assert loss.item() == pytest.approx(by_loops(positive, negatives), rel=1e-12)
    expected = numerical_gradient(lambda p: by_loops(p, negatives), positive)
    torch.testing.assert_close(leaves[0].grad, expected, rtol=1e-6, atol=1e-8)
    expected = numerical_gradient(lambda n: by_loops(positive, n), negatives)
    torch.testing.assert_close(leaves[1].grad, expected, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(lambda p, n: crd(p, n, allowed, count=7, total=50, log_z=1.3), leaves)


def test_a_sample_without_negatives_has_its_positive_alone() -> None:
    negatives = wave((1, 4), 0.9, 0.4).requires_grad_()
    loss = crd(torch.zeros(1), negatives, torch.zeros(1, 4).bool(), count=3, total=6, log_z=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1 / 1.5))
    assert not negatives.grad.any()


def test_extreme_scores_stay_finite_with_finite_gradients() -> None:
    leaves = torch.tensor([-1e4, 1e4]).requires_grad_(), torch.tensor([[1e4, -1e4], [-1e4, 1e4]]).requires_grad_()
    loss = crd(*leaves, torch.tensor([[True, True], [False, False]]), count=10, total=10, log_z=0.0)
    loss.backward()
    assert loss.item() == pytest.approx((1e4 + 10 * 1e4 / 2) / 2)
    assert leaves[0].grad.tolist() == pytest.approx([-0.5, 0.0])
    assert leaves[1].grad.flatten().tolist() == pytest.approx([2.5, 0.0, 0.0, 0.0])


@settings(max_examples=25)
@given(shift=st.floats(-20, 20), order=st.permutations(range(4)))
def test_a_common_shift_of_scores_and_log_z_and_the_order_of_negatives_change_nothing(shift, order) -> None:
    positive, negatives, allowed = wave((3,), 0.7, 0.2), wave((3, 4), 0.9, 0.4), wave((3, 4), 2.0, 0.0) > -1
    expected = crd(positive, negatives, allowed, count=7, total=50, log_z=1.3).item()
    moved = positive + shift, (negatives + shift)[:, order], allowed[:, order]
    assert crd(*moved, count=7, total=50, log_z=1.3 + shift).item() == pytest.approx(expected, rel=1e-9)


# The module


def test_value_and_gradient_equal_the_formula_with_all_samples_as_candidates() -> None:
    loss = prepared().eval()
    student = STUDENT.clone().requires_grad_()
    value = loss(outputs(student, IDS), outputs(TEACHER), LABELS)
    value.backward()
    by_loops = lambda s: crd_by_loops(loss, s, TEACHER, LABELS.tolist())  # noqa: E731
    assert value.item() == pytest.approx(by_loops(STUDENT), rel=1e-12)
    torch.testing.assert_close(student.grad, numerical_gradient(by_loops, STUDENT), rtol=1e-6, atol=1e-8)


def test_both_projectors_are_trained_and_the_teacher_is_not() -> None:
    loss, teacher = prepared(), TEACHER.clone().requires_grad_()
    loss(outputs(STUDENT, IDS), outputs(teacher), LABELS).backward()
    assert teacher.grad is None
    shapes = {name: tuple(p.shape) for name, p in loss.named_parameters()}
    assert shapes == {
        "student_projector.weight": (6, 3),
        "student_projector.bias": (6,),
        "teacher_projector.weight": (6, 5),
        "teacher_projector.bias": (6,),
    }
    assert all(p.grad.any() for p in loss.parameters())


def test_gradients_are_those_of_the_banks_before_the_step() -> None:
    """The banks are overwritten between the forward and the backward pass."""
    gradients = []
    for training in (True, False):
        loss, student = prepared().train(training), STUDENT.clone().requires_grad_()
        loss(outputs(student, IDS), outputs(TEACHER), LABELS).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_without_one_class_for_each_sample_every_other_sample_is_a_negative() -> None:
    loss = prepared().eval()
    expected = pytest.approx(crd_by_loops(loss, STUDENT, TEACHER, [-1] * 4), rel=1e-12)
    pair = outputs(STUDENT, IDS), outputs(TEACHER)
    assert loss(*pair, None).item() == expected
    assert loss(*pair, torch.full((4,), -100)).item() == expected
    assert loss(*pair, torch.softmax(wave((4, 3), 0.1, 0.2), 1)).item() == expected
    assert loss(*pair, LABELS[:, None].expand(4, 2)).item() == expected
    assert loss(*pair, LABELS).item() != expected


def test_some_labels_leave_out_the_samples_of_those_classes() -> None:
    loss = prepared().eval()
    value = loss(outputs(STUDENT, IDS), outputs(TEACHER), torch.tensor([2, -100, 2, -100]))
    assert value.item() == pytest.approx(crd_by_loops(loss, STUDENT, TEACHER, [2, -1, 2, -1]), rel=1e-12)


@pytest.mark.parametrize("count", [5, 300])
def test_the_normalisers_are_those_of_the_first_batch(count: int) -> None:
    loss = built(negatives=count)
    if count < TOTAL:
        random = torch.Generator().manual_seed(0)
        others = torch.randint(TOTAL, (count,), generator=random).tolist()
    else:
        others = list(range(TOTAL))
    expected = []
    for anchors, bank in zip(embeddings(loss, STUDENT, TEACHER), (loss.teacher_bank, loss.student_bank), strict=True):
        means = []
        for anchor, own in zip(anchors, IDS.tolist(), strict=True):
            powers = (anchor @ bank.T / loss.tau).exp().tolist()
            negatives = [powers[j] for j in others if j != own]
            means.append((powers[own] + count * sum(negatives) / len(negatives)) / (count + 1))
        expected.append(TOTAL * sum(means) / len(means))
    dry = loss.eval()(outputs(STUDENT, IDS), outputs(TEACHER), LABELS).item()
    by_loops = crd_by_loops(loss, STUDENT, TEACHER, LABELS.tolist(), others, z=expected)
    assert dry == pytest.approx(by_loops, rel=1e-9)
    assert loss.train()(outputs(STUDENT, IDS), outputs(TEACHER), LABELS).item() == dry
    assert loss.log_z.exp().tolist() == pytest.approx(expected, rel=1e-9)
    loss(outputs(2 * STUDENT, IDS), outputs(TEACHER - 1), LABELS)
    assert loss.log_z.exp().tolist() == pytest.approx(expected, rel=1e-9)


def test_a_step_moves_the_batchs_entries_by_the_momentum_and_normalises_them() -> None:
    loss = prepared(momentum=0.3)
    before, labels = weights(loss), loss.labels.clone()
    targets = torch.tensor([1, -100, 2, 0])
    loss(outputs(STUDENT, IDS), outputs(TEACHER), targets)
    for name, new in zip(("student_bank", "teacher_bank"), embeddings(loss, STUDENT, TEACHER), strict=True):
        expected = before[name].clone()
        for entry, i in zip(new, IDS.tolist(), strict=True):
            moved = [0.3 * old + 0.7 * x for old, x in zip(before[name][i].tolist(), entry.tolist(), strict=True)]
            length = math.sqrt(sum(x * x for x in moved))
            expected[i] = torch.tensor([x / length for x in moved], dtype=torch.float64)
        torch.testing.assert_close(loss.get_buffer(name), expected, rtol=1e-12, atol=1e-12)
    labels[[7, 4, 10]] = torch.tensor([1, 2, 0])  # the unlabelled one keeps what was known
    assert torch.equal(loss.labels, labels)
    assert loss.step.item() == 4
    assert torch.equal(loss.log_z, before["log_z"])


def test_of_a_sample_that_comes_twice_the_first_counts() -> None:
    once, twice = prepared(), prepared()
    once(outputs(STUDENT[:2], IDS[:2]), outputs(TEACHER[:2]), LABELS[:2])
    twice(outputs(STUDENT[:3], torch.tensor([7, 0, 7])), outputs(TEACHER[:3]), LABELS[:3])
    assert_equal(weights(once), weights(twice))


def test_nothing_is_remembered_and_nothing_drawn_from_the_global_generator_in_eval_mode() -> None:
    for loss in (built(negatives=5).eval(), prepared(negatives=5).eval()):
        before, random = weights(loss), torch.get_rng_state()
        value = loss(outputs(STUDENT, IDS), outputs(TEACHER), LABELS)
        assert value.isfinite()
        assert_equal(weights(loss), before)
        loss.train()(outputs(STUDENT, IDS), outputs(TEACHER), LABELS)
        assert torch.equal(torch.get_rng_state(), random)


def test_fewer_negatives_than_samples_are_drawn_by_seed_and_step() -> None:
    def value(step: int, **options: object) -> float:
        loss = prepared(negatives=5, **options).eval()
        loss.step.fill_(step)
        return loss(outputs(STUDENT, IDS), outputs(TEACHER), LABELS).item()

    assert value(3) == value(3)
    assert len({value(3), value(4), value(3, seed=1), value(4, seed=1)}) == 4
    loss = prepared(negatives=5)
    random = torch.Generator().manual_seed(3)
    others = torch.randint(TOTAL, (5,), generator=random).tolist()
    assert value(3) == pytest.approx(crd_by_loops(loss, STUDENT, TEACHER, LABELS.tolist(), others), rel=1e-12)


def test_the_expectation_over_draws_is_that_of_all_samples() -> None:
    drawn = prepared(negatives=10).eval()
    values = []
    for step in range(400):
        drawn.step.fill_(step)
        values.append(drawn(outputs(STUDENT, IDS), outputs(TEACHER), LABELS).item())
    mean, error = sum(values) / 400, torch.tensor(values).std().item() / 20
    exact = crd_by_loops(drawn, STUDENT, TEACHER, LABELS.tolist())
    assert mean == pytest.approx(exact, abs=4 * error)
    assert error < 0.02 * exact


def test_maps_and_tokens_are_averaged() -> None:
    loss = prepared().eval()
    expected = loss(outputs(STUDENT, IDS), outputs(TEACHER), LABELS).item()
    offset = torch.tensor([1.0, -1.0], dtype=torch.float64)
    maps = STUDENT[:, :, None, None] + offset
    tokens = TEACHER[:, None] + offset[:, None]
    assert loss(outputs(maps, IDS), outputs(tokens), LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_banks_begin_as_the_authors_with_the_seed_alone() -> None:
    torch.manual_seed(1)
    one, other, another = (CRD("layer", seed=seed) for seed in (0, 0, 1))
    for loss in (one, other, another):
        loss.build(outputs(STUDENT, IDS, 5000), outputs(TEACHER))
    for name in ("student_bank", "teacher_bank"):
        bank = one.get_buffer(name)
        assert bank.shape == (5000, 128)
        assert bank.abs().max().item() == pytest.approx(1 / math.sqrt(128 / 3), rel=1e-3)
        assert bank.mean().item() == pytest.approx(0, abs=1e-3)
        assert torch.equal(bank, other.get_buffer(name))
        assert not torch.equal(bank, another.get_buffer(name))
    assert not torch.equal(one.student_bank, one.teacher_bank)


def test_everything_that_a_resume_needs_is_in_the_state() -> None:
    assert set(built().state_dict()) - {name for name, _ in built().named_parameters()} == {
        "student_bank", "teacher_bank", "labels", "log_z", "step",
    }  # fmt: skip


def test_bfloat16_banks_and_one_sample_work() -> None:
    loss = prepared().bfloat16()
    value = loss(outputs(STUDENT[:1].float(), IDS[:1]), outputs(TEACHER[:1].float()), LABELS[:1])
    value.backward()
    assert value.dtype == torch.float32
    reference = prepared().eval()(outputs(STUDENT[:1], IDS[:1]), outputs(TEACHER[:1]), LABELS[:1])
    assert value.item() == pytest.approx(reference.item(), rel=0.05)  # bfloat16 has 8 bits


# In a training


def identified(count: int = 32, **options: object) -> DataLoader:
    return DataLoader(WithIds(TensorDataset(*samples(count))), **{"batch_size": 8, **options})


def distilled(seed: int = 0, **options: object):
    loss = CRD("act", **{"feature_dim": 8, "negatives": 12, "tau": 0.2, "weight": 0.1, **options})
    return distillation(network(seed, dropout=0.2), losses={"crd": loss})


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    states = []
    for seed, resume in ((7, None), (8, tmp_path / "epoch=0.ckpt")):
        seed_everything(seed)
        module = distilled(seed)
        keep = ModelCheckpoint(tmp_path if resume is None else tmp_path / "again", filename="{epoch}", save_top_k=-1)
        fit = trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True)
        fit.fit(module, identified(shuffle=True), ckpt_path=resume, weights_only=True if resume else None)
        states.append({**weights(module.student), **weights(module.objective)})
    assert_equal(*states)
    assert states[0]["losses.crd.step"].item() == 8
    assert (states[0]["losses.crd.labels"] == samples(32)[1]).all()


class Plain(LightningModule):
    """Knows nothing of ids."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = network(seed, dropout=0.2)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self.parameters())


def test_so_it_is_in_a_module_that_stays_as_it_is(tmp_path: Path) -> None:
    states = []
    for seed, resume in ((7, None), (8, tmp_path / "epoch=0.ckpt")):
        seed_everything(seed)
        module, loss = Plain(seed), CRD("act", feature_dim=8, negatives=12, tau=0.2, weight=0.1)
        distil = Distillation(good_teacher(), {"crd": loss}, student="net")
        keep = ModelCheckpoint(tmp_path if resume is None else tmp_path / "again", filename="{epoch}", save_top_k=-1)
        fit = trainer(max_epochs=2, callbacks=[distil, keep], enable_checkpointing=True)
        fit.fit(module, identified(shuffle=True), ckpt_path=resume, weights_only=True if resume else None)
        states.append({**weights(module), **weights(distil.objective)})
    assert_equal(*states)
    assert states[0]["losses.crd.step"].item() == 8


def test_a_training_brings_a_samples_embeddings_together() -> None:
    seed_everything(0)
    module = distilled(momentum=0.1)
    trainer(max_epochs=20).fit(module, identified())
    scores = module.losses.crd.student_bank @ module.losses.crd.teacher_bank.T
    labels = samples(32)[1]
    own, other = scores.diag().mean(), scores[labels[:, None] != labels].mean()
    assert own > other + 0.5


def test_no_schedule_of_temperatures_finds_tau() -> None:
    assert distilled().objective.temperatures() == {}


def test_a_batch_that_does_not_say_which_samples_it_holds_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"losses \['crd'\] remember samples, expected.*kd_lightning\.data\.WithIds"):
        trainer().fit(distilled(), loader())
    loss = built()
    with pytest.raises(ValueError, match=r"crd remembers samples, expected a batch that says which.*WithIds\(dataset"):
        loss(outputs(STUDENT), outputs(TEACHER), LABELS)


@pytest.mark.parametrize("ids", [[0, 1, 2, 11], [-1, 1, 2, 3]])
def test_ids_out_of_range_are_refused(ids: list[int]) -> None:
    loss = built()
    before = weights(loss)
    with pytest.raises(ValueError, match=rf"sample ids {min(ids)} to {max(ids)} of 11, expected 0 to 10 of 11, the"):
        loss(outputs(STUDENT, torch.tensor(ids)), outputs(TEACHER), LABELS)
    assert_equal(weights(loss), before)


def test_another_data_set_than_at_first_is_refused() -> None:
    module = distilled()
    trainer().fit(module, identified(32))
    with pytest.raises(
        ValueError, match=r"sample ids 0 to 7 of 24, expected 0 to 31 of 32, the samples of the data set"
    ):
        trainer().fit(module, identified(24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "expected tau > 0, got 0.0"),
        ({"tau": math.nan}, "expected tau > 0, got nan"),
        ({"negatives": 0}, "expected feature_dim >= 1 and negatives >= 1, got 128 and 0"),
        ({"feature_dim": 0}, "expected feature_dim >= 1 and negatives >= 1, got 0 and 16384"),
        ({"momentum": 1.0}, r"expected momentum in \[0, 1\), got 1.0"),
        ({"weight": -1}, "expected weight >= 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRD("layer", **options)


# Two processes

TWO = """
import os, sys, torch, torch.distributed as dist, tests.losses.test_crd as t

torch.set_num_threads(1)
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=2)
torch.save(t.steps(slice(3 * rank, 3 + rank)), f"{sys.argv[1]}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    os.wait()
"""


def steps(part: slice) -> dict[str, Tensor]:
    """The state after two steps on a part of the batch, and the gradients of the sum over its samples in each."""
    loss, result = built(negatives=5), {}
    for i in range(2):
        loss.zero_grad()
        batch = outputs((STUDENT + i)[part], IDS[part]), outputs((TEACHER - i)[part])
        (loss(*batch, LABELS[part]) * len(IDS[part])).backward()
        result |= {f"{name} {i}": p.grad.clone() for name, p in loss.named_parameters()}
    return result | weights(loss)


def test_two_processes_keep_one_bank_and_learn_what_one_learns_from_the_whole_batch(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", TWO, tmp_path], check=True, timeout=120, cwd=root)
    one, two, whole = (*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), steps(slice(None)))
    for name, expected in whole.items():
        gradient = name.endswith((" 0", " 1"))
        got = one[name] + two[name] if gradient else one[name]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert gradient or torch.equal(one[name], two[name])
