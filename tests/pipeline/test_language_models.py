"""Stages of language models: bits, what the teacher's outputs say beside them, files, and texts of the models' own."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.callbacks import SequenceLevel
from kd_lightning.losses import ForwardKL, HardLabel, SampledLabel
from kd_lightning.models import GPT
from kd_lightning.outputs import Outputs
from kd_lightning.pipeline.measure import OpenFile, measure_writing
from kd_lightning.pipeline.quantize import float_file
from kd_lightning.tasks import LanguageModelling
from tests.command import kd_lightning
from tests.pipeline.tiny_training import TinyData, make_trainer, run, training

VOCABULARY, LENGTH = 7, 6


def texts(count: int, seed: int) -> DataLoader:
    """Each token is the one before it, or one or two further; drawn alike."""
    random = torch.Generator().manual_seed(seed)
    start, steps = torch.randint(VOCABULARY, (count, 1), generator=random), (0.6, 0.3, 0.1)
    ahead = torch.multinomial(torch.tensor(steps), count * LENGTH, replacement=True, generator=random)
    tokens = torch.cat([start, start + ahead.view(count, LENGTH).cumsum(1)], 1) % VOCABULARY
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=16)


class Texts(TinyData):
    def train_dataloader(self) -> DataLoader:
        return texts(64, 0)

    def training_set(self) -> Any:
        return texts(64, 0).dataset

    def val_dataloader(self) -> DataLoader:
        return texts(32, 1)

    def test_dataloader(self) -> DataLoader:
        return texts(160, 2)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def model(role: str, **changes: Any) -> Any:
    losses = {"teacher": {"hard": HardLabel}, "distilled": {"kl": ForwardKL}, "control": {"sampled": SampledLabel}}
    given = {
        "task": LanguageModelling(per="character"),
        "network": partial(GPT, VOCABULARY, LENGTH, 1, 2, 16 if role == "teacher" else 8),
        "losses": lambda: {name: make() for name, make in losses.get(role, losses["teacher"]).items()},
        "data": Texts,
        "optimizer": adam,
        "trainer": partial(make_trainer, max_epochs=8 if role == "teacher" else 3),
    }
    return training(role, **{**given, **changes})


def outputs(stage: Any, loader: DataLoader) -> torch.Tensor:
    return torch.cat([stage.network().eval()(tokens) for tokens, _ in loader]).detach()


def test_a_stage_tells_its_bits_and_how_near_it_is_to_its_teacher(tmp_path: Path) -> None:
    teacher = run(tmp_path, model("teacher"))
    assert {"kl_teacher", "acceptance"} & set(teacher.result.figures) == set()
    for role in ("student", "control", "distilled"):
        stage = run(tmp_path, model(role, seed=1), teacher if role != "student" else None, judge=teacher)
        logits, targets = outputs(stage, texts(160, 2)), torch.cat([target for _, target in texts(160, 2)])
        bits = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / np.log(2)
        assert stage.training.task.headline.value(stage.result.scores) == pytest.approx(float(bits), rel=1e-5)
        p_t, p_s = (outputs(of, texts(160, 2)).softmax(-1) for of in (teacher, stage))
        # Of every one of the batches, as there are ten: eight or more.
        assert stage.result.figures["acceptance"] == pytest.approx(
            float(torch.minimum(p_t, p_s).sum(-1).mean()), rel=1e-4
        )
        kl = (p_t * (p_t / p_s).log2()).sum(-1).mean()
        assert stage.result.figures["kl_teacher"] == pytest.approx(float(kl), rel=1e-4)


def test_another_teacher_makes_another_stage_of_the_student_alone(tmp_path: Path) -> None:
    """What it is worth as a draft is another with another teacher, though its weights are the same."""
    first, second = (run(tmp_path, model("teacher", seed=seed)) for seed in (0, 1))
    alone = run(tmp_path, model("student"), judge=first)
    assert run(tmp_path, model("student"), judge=first).reused
    other = run(tmp_path, model("student"), judge=second)
    assert not other.reused
    assert other.result.figures["kl_teacher"] != alone.result.figures["kl_teacher"]
    assert np.array_equal(other.result.scores, alone.result.scores)


def test_the_file_gives_the_same_bits(tmp_path: Path) -> None:
    stage = run(tmp_path, model("student"))
    data = stage.training.make_data()
    data.setup("test")
    task, answering = stage.training.task, OpenFile(float_file(stage, data))
    read = [task.read(batch) for batch in data.test_dataloader()]
    scores = np.concatenate([task.scores(Outputs(answering(batch).logits), batch.target).numpy() for batch in read])
    assert task.headline.value(scores) == pytest.approx(task.headline.value(stage.result.scores), abs=1e-4)


def test_a_callback_that_keeps_samples_is_told_which_they_are(tmp_path: Path) -> None:
    teacher = run(tmp_path, model("teacher"))
    losses = lambda: {"hard": HardLabel()}  # noqa: E731
    stage = run(tmp_path, model("distilled", losses=losses, callbacks=lambda: [SequenceLevel()]), teacher)
    assert np.isfinite(stage.result.scores).all()


def test_models_that_write_are_timed_and_others_left_out() -> None:
    class Plain(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 3)

    found = measure_writing({"gpt": GPT(VOCABULARY, LENGTH, 1, 2, 8), "plain": Plain()}, seconds=0.05)
    assert set(found) == {"gpt"}
    assert found["gpt"]["tokens_per_s"] > 0


@pytest.mark.integration
def test_the_command_distils_a_language_model_of_ones_own_texts_and_quantises_it(tmp_path: Path) -> None:
    """Bytes of a text file, two sizes, sampled labels as the control, files in 8 and in 4 bits."""
    random = np.random.default_rng(0)
    words = ["whale", "ship", "sea", "the", "of", "and", "a", "white"]
    (tmp_path / "text.txt").write_text(" ".join(random.choice(words, 12_000)))
    printed = kd_lightning(
        "experiment=shakespeare/few_plays",
        "data=text_files",
        "data.files=[text.txt]",
        "task.per=byte",
        "data.context=32",
        "data.eval_blocks=64",
        *(f"{of}.network.vocabulary=256" for of in ("teacher", "student")),
        *(f"{of}.network.layers=1" for of in ("teacher", "student")),
        "teacher.network.width=32",
        "student.network.width=16",
        "teacher.trainer.max_steps=120",
        "trainer.max_steps=40",
        "quantized.steps=4",
        "seeds=[0,1]",
        "logger=null",
        cwd=tmp_path,
    )
    assert "bits per byte" in printed
    verdict = json.loads(next(tmp_path.glob("mlruns/stages/pipeline-*/verdict.json")).read_text())
    models = verdict["models"]
    bits = {name: model["cross-entropy"]["mean"] for name, model in models.items()}
    assert bits["teacher"] < 4  # of 8
    for name in ("student", "control", "distilled"):
        assert 0 < models[name]["acceptance"] < 1
        assert models[name]["tokens_per_s"] > 0
    assert abs(bits["distilled PTQ int8"] - bits["distilled"]) < 0.05
    assert models["distilled 4-bit weights"]["file_mb"] < models["distilled"]["file_mb"]
