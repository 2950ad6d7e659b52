"""A schedule moves what it is told to, at each optimizer step, however the trainer counts."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning.callbacks import HyperparameterSchedule, TemperatureSchedule
from kd_lightning.losses import KD, CurriculumTemperature, HardLabel
from kd_lightning.schedules import cosine, linear, step, warmup
from tests.losses.reference import softmax
from tests.tiny import assert_equal, distillation, good_teacher, loader, logged, network, samples, trainer, weights


class Notes(Callback):
    """Temperature, weight, the loss that was computed with them, and the student before each micro-batch."""

    def __init__(self) -> None:
        self.temperatures: list[float] = []
        self.weights: list[float] = []
        self.losses: list[float] = []
        self.students: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.students.append(weights(pl_module.student))

    def on_train_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        self.temperatures.append(pl_module.losses.kd.temperature)
        self.weights.append(pl_module.losses.kd.weight)
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


def soft_loss(student: nn.Module, x: torch.Tensor, temperature: float) -> float:
    """T²·KL in plain Python, with the temperature on both sides."""
    with torch.no_grad():
        rows = zip(student(x).tolist(), good_teacher().eval()(x).tolist(), strict=True)
    pairs = [(softmax(s, temperature), softmax(t, temperature)) for s, t in rows]
    divergences = [sum(q * math.log(q / p) for p, q in zip(s, t, strict=True)) for s, t in pairs]
    return temperature**2 * sum(divergences) / len(pairs)


def test_the_temperature_moves_both_sides_and_its_square(tmp_path: Path) -> None:
    notes, module = Notes(), distillation(losses={"kd": KD(temperature=1.0)})
    callbacks = [TemperatureSchedule(linear(8.0, 2.0)), notes]
    fit = trainer(max_epochs=2, callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    fit.fit(module, loader(24))
    assert notes.temperatures == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    batches = [x for x, _ in loader(24)] * 2
    for state, x, temperature, loss in zip(notes.students, batches, notes.temperatures, notes.losses, strict=True):
        student = network().train()
        student.load_state_dict(state)
        # The loss is computed in float32.
        assert loss == pytest.approx(soft_loss(student, x, temperature), rel=1e-4)
    assert list(logged(tmp_path)["kd/temperature"].values()) == notes.temperatures


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 6, "max_epochs": -1}, {"max_steps": 6}])
@pytest.mark.parametrize("every", [1, 2])
def test_progress_counts_optimizer_steps(length: dict, every: int) -> None:
    notes = Notes()
    fit = trainer(
        **{"max_epochs": None, **length},
        accumulate_grad_batches=every,
        callbacks=[TemperatureSchedule(linear(7, 1)), notes],
    )
    fit.fit(distillation(losses={"kd": KD()}), loader(24 * every))
    assert fit.global_step == 6
    assert notes.temperatures == [t for t in (7, 6, 5, 4, 3, 2) for _ in range(every)]


def test_the_shorter_of_steps_and_epochs_is_the_length() -> None:
    notes = Notes()
    trainer(max_steps=4, max_epochs=50, callbacks=[TemperatureSchedule(linear(8, 4)), notes]).fit(
        distillation(losses={"kd": KD()}), loader(24)
    )
    assert notes.temperatures == [8, 7, 6, 5]


def test_micro_batches_at_the_end_of_an_epoch_that_fill_no_step_still_step() -> None:
    """3 batches in steps of 2: two steps an epoch, the second one of a single batch."""
    notes = Notes()
    callbacks = [TemperatureSchedule(linear(8, 4)), notes]
    trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=callbacks).fit(
        distillation(losses={"kd": KD()}), loader(24)
    )
    assert notes.temperatures == [8, 8, 7, 6, 6, 5]


def test_a_resume_goes_on_where_the_schedule_was(tmp_path: Path) -> None:
    def run(resume: str | None = None) -> tuple[Notes, dict]:
        notes, module = Notes(), distillation()
        callbacks = [
            TemperatureSchedule(cosine(8, 1)),
            HyperparameterSchedule("losses.kd.weight", warmup(0.9, 0.5)),
            notes,
            *([] if resume else [ModelCheckpoint(tmp_path, save_top_k=-1)]),
        ]
        fit = trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
        fit.fit(module, loader(24), ckpt_path=resume)
        return notes, weights(module.student)

    whole, expected = run()
    for done in (1, 2):
        rest, state = run(str(tmp_path / f"epoch={done - 1}-step={3 * done}.ckpt"))
        assert rest.temperatures == whole.temperatures[3 * done :]
        assert rest.weights == whole.weights[3 * done :]
        assert_equal(state, expected)


def test_any_number_is_scheduled_by_its_path_and_logged_under_it(tmp_path: Path) -> None:
    notes = Notes()
    callbacks = [HyperparameterSchedule("losses.kd.weight", step([0.0, 1.0], [0.5])), notes]
    fit = trainer(max_epochs=2, callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    module = distillation()
    fit.fit(module, loader(24))
    assert notes.weights == [0, 0, 0, 1, 1, 1]
    values = logged(tmp_path)
    assert list(values["losses/kd/weight"].values()) == notes.weights
    weighted, raw = (list(values[f"train/{name}/kd"].values()) for name in ("loss_weighted", "loss"))
    assert weighted[:3] == [0, 0, 0]
    assert weighted[3:] == pytest.approx(raw[3:])


def test_one_loss_or_all_that_have_a_temperature() -> None:
    losses = {"hard_label": HardLabel(), "one": KD(3.0), "kd": KD(4.0)}
    for name, expected in ((None, (5.5, 5.5)), ("one", (5.5, 4.0))):
        module = distillation(
            losses={key: type(x)() if key == "hard_label" else KD(x.temperature) for key, x in losses.items()}
        )
        trainer(callbacks=[TemperatureSchedule(linear(8, 3), loss=name)]).fit(module, loader(16))
        assert (module.losses.one.temperature, module.losses.kd.temperature) == expected


def test_an_attribute_of_the_module_itself() -> None:
    module = distillation()
    module.share = 0.0
    trainer(callbacks=[HyperparameterSchedule("share", linear(0, 1))]).fit(module, loader(16))
    assert module.share == 0.5


class Endless(IterableDataset):
    def __iter__(self):
        x, y = samples(8)
        while True:
            yield from zip(x, y, strict=True)


@pytest.mark.parametrize(
    "schedule", [TemperatureSchedule(linear(8, 1)), HyperparameterSchedule("losses.kd.weight", linear(1, 0))]
)
def test_an_unknown_length_is_refused_before_the_first_step(schedule: Callback) -> None:
    module, fit = distillation(check_teacher=False), trainer(max_epochs=1, callbacks=[schedule])
    before = weights(module.student)
    with pytest.raises(
        ValueError,
        match="a schedule needs the number of optimizer steps, got an unknown one: pass the Trainer max_steps",
    ):
        fit.fit(module, DataLoader(Endless(), batch_size=4))
    assert fit.global_step == 0
    assert_equal(weights(module.student), before)


class Finite(Endless):
    def __iter__(self):
        yield from zip(*samples(12), strict=True)


def test_with_max_epochs_a_loader_without_length_is_scheduled_by_epochs() -> None:
    notes = Notes()
    fit = trainer(max_epochs=4, callbacks=[TemperatureSchedule(linear(8, 4)), notes])
    fit.fit(distillation(losses={"kd": KD()}, check_teacher=False), DataLoader(Finite(), batch_size=4))
    assert notes.temperatures == [8] * 3 + [7] * 3 + [6] * 3 + [5] * 3


@pytest.mark.parametrize("schedule", [TemperatureSchedule(linear(8, 2))])
def test_with_max_steps_a_loader_needs_no_length(schedule: Callback) -> None:
    notes = Notes()
    fit = trainer(max_epochs=-1, max_steps=3, callbacks=[schedule, notes])
    fit.fit(distillation(losses={"kd": KD()}, check_teacher=False), DataLoader(Endless(), batch_size=4))
    assert notes.temperatures == [8, 6, 4]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("losses.kdd.weight", r"schedule path 'losses\.kdd\.weight': .*kdd.*; losses here: \['hard_label', 'kd'\]"),
        ("losses.kd.tau", r"schedule path 'losses\.kd\.tau': .*tau"),
        ("loses.kd.weight", r"schedule path 'loses\.kd\.weight': .*loses"),
        ("losses.kd", r"schedule path 'losses\.kd' leads to a KD, expected a number"),
        ("losses.kd.needs_labels", "leads to a bool, expected a number"),
        ("losses.kd.student_layers", "leads to a tuple, expected a number"),
        ("nothing", "schedule path 'nothing': .*nothing"),
        ("", "schedule path ''"),
    ],
)
def test_a_path_to_no_number_is_refused_before_the_first_step(path: str, message: str) -> None:
    fit, module = trainer(callbacks=[HyperparameterSchedule(path, linear(1, 0))]), distillation()
    before = weights(module.student)
    with pytest.raises(ValueError, match=message):
        fit.fit(module, loader())
    assert fit.global_step == 0
    assert_equal(weights(module.student), before)


@pytest.mark.parametrize(
    ("loss", "losses", "message"),
    [
        ("kdd", {"kd": KD()}, r"no loss 'kdd' has a temperature to schedule; those that have one: \['kd'\]"),
        ("hard_label", {"hard_label": HardLabel(), "kd": KD()}, "no loss 'hard_label' has a temperature"),
        (None, {"hard_label": HardLabel()}, r"no loss has a temperature to schedule, expected for instance"),
    ],
)
def test_a_temperature_schedule_without_a_temperature_is_refused(loss, losses, message: str) -> None:
    fit = trainer(callbacks=[TemperatureSchedule(linear(8, 1), loss)])
    with pytest.raises(ValueError, match=message):
        fit.fit(distillation(losses=losses), loader())
    assert fit.global_step == 0


@pytest.mark.parametrize("name", [None, "ctkd"])
def test_a_temperature_that_is_learnt_is_not_scheduled(name: str | None) -> None:
    module = distillation(losses={"ctkd": CurriculumTemperature(KD())})
    fit = trainer(callbacks=[TemperatureSchedule(linear(8, 1), name)])
    before = weights(module)
    with pytest.raises(ValueError, match=r"losses \['ctkd'\] learn their temperature, expected one that is a number"):
        fit.fit(module, loader())
    assert fit.global_step == 0
    assert_equal(weights(module), before)


@pytest.mark.parametrize("name", [None, "kd"])
def test_of_several_losses_those_with_a_number_are_scheduled(name: str | None) -> None:
    module = distillation(losses={"ctkd": CurriculumTemperature(KD(), strength=0.0), "kd": KD(4.0)})
    trainer(callbacks=[TemperatureSchedule(linear(8, 3), name)]).fit(module, loader(16))
    assert module.losses.kd.temperature == 5.5
    assert module.losses.ctkd.temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))


def test_a_schedule_that_leaves_the_positive_temperatures_is_stopped() -> None:
    fit = trainer(max_epochs=4, callbacks=[TemperatureSchedule(linear(8, -8))])
    with pytest.raises(ValueError, match=r"gives 0\.0 after 50\.0% of the training, expected values above 0"):
        fit.fit(distillation(), loader(16))
    assert fit.global_step == 0
