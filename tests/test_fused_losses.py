"""Losses that compute the logits themselves, in trainings: the same as losses on logits, without the logits."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kd_lightning import Distillation, DistillationModule
from kd_lightning.idle_heads import idle
from kd_lightning.losses import (
    KD,
    DistillationLoss,
    ForwardKL,
    FusedDivergence,
    FusedHardLabel,
    FusedKL,
    HardLabel,
    Hint,
    JensenShannon,
    ReverseKL,
    jensen_shannon,
)
from kd_lightning.tasks import LanguageModelling, Taught, TokenClassification
from kd_lightning.teachers import Ensemble, FromBatch, Momentum
from tests.tiny import sgd, trainer, weights

V, S, BATCH = 211, 6, 4
HEADS = ("norm", "head", "norm", "head")


class LM(nn.Module):
    """A language model as small as can be, whose head may be the table of embeddings."""

    def __init__(self, width: int = 8, tied: bool = True, bias: bool = False, change: Any = None) -> None:
        super().__init__()
        self.embedding, self.mix, self.norm = nn.Embedding(V, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, V, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.change = change

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.norm(self.mix(self.embedding(tokens)).relu()))
        return logits if self.change is None else self.change(logits)


def network(seed: int = 0, **options: Any) -> LM:
    torch.manual_seed(seed)
    return LM(**options)


def teacher(**options: Any) -> LM:
    return network(1, width=12, **options)


def data(labels: bool = True) -> DataLoader:
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(V, (3 * BATCH, S + 1), generator=random)
    target = tokens[:, 1:].clone()
    target[::3, -2:] = -100
    parts = (tokens[:, :-1], target) if labels else (tokens[:, :-1],)
    return DataLoader(TensorDataset(*parts), batch_size=BATCH)


class Existing(LightningModule):
    """Somebody's module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        return nn.functional.cross_entropy(logits.flatten(0, -2).float(), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def through_module(
    student: nn.Module, taught_by: Any, losses: Mapping[str, DistillationLoss], loader: Any = None, **options: Any
) -> Trainer:
    module = DistillationModule(student, taught_by, losses, sgd, task=TokenClassification(), check_teacher=False)
    fit = trainer(**{"max_epochs": 2, "log_every_n_steps": 1, **options})
    fit.fit(module, data() if loader is None else loader)
    return fit


def through_callback(
    student: nn.Module, taught_by: Any, losses: Mapping[str, DistillationLoss], loader: Any = None, **options: Any
) -> Trainer:
    task = TokenClassification()
    callback = Distillation(taught_by, losses, student="net", task=task, check_teacher=False, task_weight=0.5)
    fit = trainer(
        **{"max_epochs": 2, "log_every_n_steps": 1, **options, "callbacks": [callback, *options.get("callbacks", [])]}
    )
    fit.fit(Existing(student), data() if loader is None else loader)
    return fit


DOORS = [through_module, through_callback]
every_door = pytest.mark.parametrize("door", DOORS)
PAIRS: dict[str, tuple[Callable[[], dict[str, DistillationLoss]], Callable[[], dict[str, DistillationLoss]]]] = {
    "labels and KL": (
        lambda: {"hard_label": HardLabel(0.3), "kl": ForwardKL(2.0, weight=0.7)},
        lambda: {
            "hard_label": FusedHardLabel("norm", "head", 0.3, memory=0.01),
            "kl": FusedKL(*HEADS, temperature=2.0, weight=0.7, memory=0.01),
        },
    ),
    "reverse KL": (lambda: {"kl": ReverseKL()}, lambda: {"kl": FusedDivergence("reverse_kl", *HEADS)}),
    "a function": (
        lambda: {"jsd": JensenShannon(0.3, temperature=2.0)},
        lambda: {"jsd": FusedDivergence(partial(jensen_shannon, beta=0.3), *HEADS, temperature=2.0)},
    ),
}


def fused() -> dict[str, DistillationLoss]:
    return PAIRS["labels and KL"][1]()


# The same training


@every_door
@pytest.mark.parametrize("losses", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("options", [{}, {"tied": False, "bias": True}], ids=["tied", "untied, bias"])
def test_a_training_gives_the_weights_that_losses_on_logits_give(door: Any, losses: Any, options: Any) -> None:
    found, metrics = [], []
    for make in losses:
        student = network(**options)
        fit = door(student, teacher(bias=True, tied=False), make())
        found.append(weights(student))
        metrics.append({k: v for k, v in fit.logged_metrics.items() if k.startswith("train/loss")})
    assert metrics[1].keys() == metrics[0].keys()
    torch.testing.assert_close(metrics[1], metrics[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    start = weights(network(**options))
    assert not torch.equal(start["head.weight"], found[1]["head.weight"])


@every_door
def test_the_teachers_best_tokens_are_enough(door: Any) -> None:
    """Which come with the batch: there is no network of a teacher."""

    class Stored(Dataset):
        def __len__(self) -> int:
            return 3 * BATCH

        def __getitem__(self, i: int) -> Any:
            tokens, target = data().dataset[i]
            with torch.no_grad():
                best = strong(tokens[None])[0].log_softmax(-1).topk(5, -1)
            return Taught((tokens, target), {"indices": best.indices, "log_probs": best.values})

    strong, found = teacher(), []
    for loss in (ForwardKL(), FusedKL("norm", "head", memory=0.01)):
        student = network()
        door(student, FromBatch(), {"kl": loss}, DataLoader(Stored(), batch_size=BATCH))
        found.append(weights(student))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_bfloat16_autocast_rounds_no_more_than_losses_on_logits_do() -> None:
    def moved(make: Any, precision: str) -> Tensor:
        student, start = network(), weights(network())
        through_module(student, teacher(), make(), precision=precision, max_epochs=1, limit_train_batches=1)
        return torch.cat([(x - start[name]).flatten() for name, x in weights(student).items()])

    whole, ours = PAIRS["labels and KL"]
    exact = moved(whole, "32")
    errors = [(moved(make, "bf16-mixed") - exact).norm() / exact.norm() for make in (whole, ours)]
    assert 1e-3 < errors[1] < 1.5 * errors[0]


def test_a_moving_average_of_the_student_teaches() -> None:
    found = []
    for loss in (ForwardKL(), FusedKL(*HEADS)):
        student = network()
        through_module(student, Momentum(0.5), {"hard_label": HardLabel(), "kl": loss})
        found.append(weights(student))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_holds_the_student_alone_and_resumes(tmp_path: Any) -> None:
    whole = network()
    through_module(whole, teacher(), fused())
    half = through_module(network(), teacher(), fused(), max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)
    assert saved["state_dict"].keys() == whole.state_dict().keys()
    assert not saved["losses"]
    student = network(7)
    module = DistillationModule(student, teacher(), fused(), sgd, task=TokenClassification(), check_teacher=False)
    assert not list(module.objective.parameters())
    trainer(max_epochs=2).fit(module, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    torch.testing.assert_close(weights(student), weights(whole), rtol=0, atol=0)


def test_a_compiled_student_gives_the_same_before_and_after_a_validation() -> None:
    found = []
    for compiled in (False, True):
        student = network()
        if compiled:
            torch._dynamo.reset()
            student.compile(backend="aot_eager")
        module = DistillationModule(student, teacher(), fused(), sgd, task=TokenClassification(), check_teacher=False)
        fit = trainer(max_epochs=2, log_every_n_steps=1)
        fit.fit(module, data(), data())
        found.append((weights(student), fit.callback_metrics))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def blocks(batch_size: int) -> DataLoader:
    tokens = torch.randint(V, (8, S + 1), generator=torch.Generator().manual_seed(4))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=batch_size)


SCRIPT = """
import sys, torch, tests.test_fused_losses as t

student = t.network()
fit = t.through_module(student, t.teacher(), t.fused(), t.blocks(4), devices=2, strategy="ddp")
torch.save(t.weights(student), f"{sys.argv[1]}/rank{fit.global_rank}.pt")
"""


def test_two_processes_learn_what_one_learns_from_the_whole_batch(tmp_path: Path) -> None:
    """DDP waits for the gradient of the head, which only the losses use."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=180, env=environment, cwd=tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    whole = network()
    through_module(whole, teacher(), fused(), blocks(8))
    torch.testing.assert_close(ranks[0], weights(whole), rtol=1e-4, atol=1e-6)


# No logits


class Largest(TorchDispatchMode):
    """Records the shapes of all tensors over the vocabulary that are of more tokens than ``tokens``."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.shapes = tokens, set[tuple[int, ...]]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and V in x.shape and x.numel() > self.tokens * V:
                self.shapes.add(tuple(x.shape))
        return result


class Watch(Callback):
    """Looks at the training steps, backward passes and all."""

    def __init__(self, tokens: int) -> None:
        self.mode, self.steps = Largest(tokens), 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.mode.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.mode.__exit__(None, None, None)
        self.steps += 1


def test_no_tensor_of_all_tokens_logits_is_made_in_a_training_step() -> None:
    """But the head and its gradient, (V, 8) and (V, 12), are larger than some tokens' logits."""
    for make, logits in ((PAIRS["labels and KL"][1], False), (PAIRS["labels and KL"][0], True)):
        watch = Watch(tokens=12)
        through_module(network(), teacher(), make(), callbacks=[watch])
        assert watch.steps == 6
        assert bool(watch.mode.shapes) == logits
        assert ((BATCH, S, V) in watch.mode.shapes) == logits


def test_through_the_callback_the_teachers_logits_are_spared() -> None:
    watch = Watch(tokens=12)
    ran: list[tuple[int, ...]] = []
    strong = teacher()
    strong.head.register_forward_hook(lambda _module, _args, output: ran.append(tuple(output.shape)))
    through_callback(network(), strong, {"kl": FusedKL(*HEADS, memory=0.01)}, callbacks=[watch])
    assert ran[-6:] == [(0, V)] * 6


def test_the_networks_heads_run_where_another_loss_reads_logits_and_in_validation() -> None:
    runs: dict[str, list[int]] = {"student": [], "teacher": []}

    def shapes(losses: Mapping[str, DistillationLoss], validate: bool = False) -> tuple[set[int], set[int]]:
        student, strong = network(), teacher()
        for role, net in (("student", student), ("teacher", strong)):
            runs[role].clear()
            net.head.register_forward_hook(
                lambda _module, _args, output, role=role: runs[role].append(output[..., 0].numel())
            )
        module = DistillationModule(student, strong, losses, sgd, task=TokenClassification(), check_teacher=False)
        fit = trainer(max_epochs=1, num_sanity_val_steps=0)
        fit.fit(module, data())
        last = runs["student"][-1], runs["teacher"][-1]
        if validate:
            assert fit.validate(module, data(), verbose=False)[0].keys() >= {"val/f1", "val/agreement"}
            assert runs["student"][-1] == runs["teacher"][-1] == BATCH * S
        return last

    whole = BATCH * S
    assert shapes({"kl": FusedKL(*HEADS)}, validate=True) == (0, 0)
    assert shapes({"kl": FusedKL(*HEADS), "hint": Hint("mix")}) == (0, 0)
    assert shapes({"kl": FusedKL(*HEADS), "hard_label": HardLabel()}) == (whole, 0)
    assert shapes({"kl": FusedKL(*HEADS), "kd": KD()}) == (whole, whole)
    assert shapes({"kl": FusedKL(*HEADS), "hint": Hint("head", "mix")}) == (whole, 0)


def test_an_idle_head_gives_no_logits_and_is_itself_again_afterwards() -> None:
    net, tokens = network(bias=True, tied=False), torch.zeros(2, S, dtype=torch.long)
    expected = net(tokens)
    with idle(net, ["head"]) as inputs:
        assert net(tokens).shape == (2, S, 0)
        assert net.head(torch.zeros(5, 8)).shape == (5, 0)
    assert inputs["head"].shape == (5, 8)
    assert torch.equal(net(tokens), expected)


# Refused before the first step


class Scaled(LM):
    def forward(self, tokens: Tensor) -> Tensor:
        return 30 * torch.tanh(super().forward(tokens) / 30)


def refused(message: str, student: Any = None, taught_by: Any = None, losses: Any = None, loader: Any = None) -> None:
    for door in DOORS:
        with pytest.raises(ValueError, match=message):
            door(
                network() if student is None else deepcopy(student),
                teacher() if taught_by is None else taught_by,
                {"kl": FusedKL(*HEADS)} if losses is None else deepcopy(losses),
                loader,
            )


def test_logits_that_are_not_the_heads_product_are_refused() -> None:
    apart = r"loss 'kl'.*the {}'s logits are not those of the head 'head' on this layer: they lie up to .* apart"
    refused(apart.format("student"), Scaled())
    refused(apart.format("teacher"), taught_by=Scaled())
    refused(apart.format("student"), losses={"kl": FusedKL("mix", "head", "norm", "head")})
    refused(apart.format("teacher"), losses={"kl": FusedKL("norm", "head", "mix", "head")})
    refused(apart.format("teacher"), taught_by=Ensemble([teacher(), network(5)]))


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    class Adapter(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.base, self.low = linear, nn.Linear(8, V)

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.low(x)

    adapted = network()
    adapted.head = Adapter(adapted.head)
    refused("the student's head 'head' is a Adapter, one with base, low inside, expected a plain linear layer", adapted)
    message = r"the student's head 'norm' is a LayerNorm, one without a weight \(V, D\)"
    refused(message, losses={"kl": FusedKL("norm", "norm", "norm", "head")})
    refused("LM has no layer 'haed'.*nearest: head", losses={"kl": FusedKL("norm", "haed", "norm", "head")})


def test_layers_of_another_width_and_other_vocabularies_are_refused() -> None:
    message = r"the student's layer gives \(2, 6, 12\), expected \(B, S, 8\) or \(B, 8\), as the head 'head'"
    wide = network()
    wide.mix = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    refused(message, wide, losses={"kl": FusedKL("mix.0", "head", "norm", "head")})
    fewer = teacher()
    fewer.head = nn.Linear(12, V - 1)
    refused(f"the student has {V} classes and the teacher {V - 1}|differ in their vocabulary", taught_by=fewer)


def test_a_live_teacher_without_layer_and_head_is_refused() -> None:
    refused("expected the layer and the head that its logits come from", losses={"kl": FusedKL("norm", "head")})


def test_labels_that_the_head_does_not_have_are_refused() -> None:
    tokens = torch.zeros(BATCH, S, dtype=torch.long)
    wrong = DataLoader(TensorDataset(tokens, tokens + V), batch_size=BATCH)
    refused(f"{V} is out of range", losses={"hard_label": FusedHardLabel("norm", "head")}, loader=wrong)


def test_a_network_that_needs_its_logits_is_refused() -> None:
    student = network(change=lambda logits: logits.unflatten(-1, (V, 1)).squeeze(-1))
    with pytest.raises(ValueError, match=r"the student does not run where its heads \['head'\] return \(\.\.\., 0\)"):
        through_module(student, teacher(), {"kl": FusedKL(*HEADS)})


def test_dropout_between_layer_and_head_is_refused_in_the_first_step() -> None:
    class Dropping(LM):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.norm(self.mix(self.embedding(tokens)).relu())
            return self.head(nn.functional.dropout(hidden, 0.5, self.training))

    torch.manual_seed(0)
    student = Dropping()
    start = weights(student)
    with pytest.raises(ValueError, match=r"in training the student's head 'head' gets something else .* 'norm'"):
        through_module(student, teacher(), {"kl": FusedKL(*HEADS)})
    torch.testing.assert_close(weights(student), start, rtol=0, atol=0)


# Models of Hugging Face


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_door
def test_causal_models_of_hugging_face(door: Any, family: str) -> None:
    """Their logits stand at a token's place for the next one; the task shifts the labels."""
    transformers = pytest.importorskip("transformers")
    configs = {
        "gpt2": lambda width: transformers.GPT2Config(
            vocab_size=V, n_positions=S, n_embd=width, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "llama": lambda width: transformers.LlamaConfig(
            vocab_size=V, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ),
    }
    norm = {"gpt2": "transformer.ln_f", "llama": "model.norm"}[family]

    def causal(seed: int, width: int) -> Any:
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(configs[family](width))

    class Theirs(Existing):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(**batch).loss

    ids = torch.randint(V, (2 * BATCH, S), generator=torch.Generator().manual_seed(3))
    loader = DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=BATCH)
    pairs: tuple[dict[str, DistillationLoss], ...] = (
        {"hard_label": HardLabel(0.3), "kl": ForwardKL()},
        {"hard_label": FusedHardLabel(norm, "lm_head", 0.3), "kl": FusedKL(norm, "lm_head", norm, "lm_head")},
    )
    found = []
    for losses in pairs:
        student, strong, task = causal(0, 8), causal(1, 12), LanguageModelling()
        if door is through_module:
            module: Any = DistillationModule(student, strong, losses, sgd, task=task, check_teacher=False)
            trainer(log_every_n_steps=1).fit(module, loader)
        else:
            callback = Distillation(strong, losses, student="net", task=task, check_teacher=False)
            trainer(callbacks=[callback], log_every_n_steps=1).fit(Theirs(student), loader)
        found.append(weights(student))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
