import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning import Distillation, DistillationModule, Outputs, load_student
from kd_lightning.losses import HardLabel, SimKD
from kd_lightning.models import CNN8, CNN64, resnet8x4
from tests.command import TINY, copied, kd_lightning
from tests.losses.reference import wave
from tests.tiny import CLASSES, assert_equal, good_teacher, loader, network, samples, sgd, trainer, weights


def simkd(**options: object) -> SimKD:
    return SimKD("act", student_classifier="head", **options)


def module(**options: object) -> DistillationModule:
    torch.manual_seed(3)  # of the projector
    return DistillationModule(network(), good_teacher(), {"simkd": simkd()}, sgd, **options)


def fitted(**options: object) -> tuple[DistillationModule, object]:
    made, fit = module(), trainer(**options)
    fit.fit(made, loader())
    return made, fit


class Maps(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv(x)).flatten(1))


def test_the_student_ends_in_a_projector_and_the_teachers_classifier() -> None:
    made, _ = fitted(max_epochs=2)
    x, teacher = samples(5)[0], made.teacher.network
    student = made.student.eval()
    features = F.relu(student.norm(student.stem(x)))
    projected = student.act.projector(features)
    assert projected.shape == (5, 16)
    torch.testing.assert_close(made(x), projected @ teacher.head.weight.T + teacher.head.bias)
    assert_equal(weights(student.head[0]), weights(teacher.head))
    assert student.head[0].weight is not teacher.head.weight


def test_the_term_is_the_mean_squared_error_of_projected_and_teachers_features() -> None:
    student, teacher, x = Maps(4).double(), Maps(6).double(), wave((2, 3, 4, 4), 0.3, 0.1)
    loss = SimKD("conv")
    loss.change(student, teacher, x)
    projected, expected = student.eval().conv(x), teacher.conv(x)
    assert projected.shape == expected.shape == (2, 6, 4, 4)
    value = loss(Outputs(x, {"conv": projected}), Outputs(x, {"conv": expected}), None)
    pairs = zip(projected.flatten().tolist(), expected.flatten().tolist(), strict=True)
    assert value.item() == pytest.approx(sum((s - t) ** 2 for s, t in pairs) / projected.numel(), rel=1e-12)
    value.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.conv.projector[0].parameters())
    assert student.fc[0].weight.grad is None
    assert teacher.conv.weight.grad is None


@pytest.mark.parametrize("strides", [(1, 2), (2, 1)])
def test_the_larger_map_is_average_pooled_to_the_smaller(strides: tuple[int, int]) -> None:
    student, teacher, x = Maps(4, strides[0]).double(), Maps(6, strides[1]).double(), wave((2, 3, 4, 4), 0.3, 0.1)
    loss = SimKD("conv")
    loss.change(student, teacher, x)
    s, t = student.eval().conv(x), teacher.conv(x)
    value = loss(Outputs(x, {"conv": s}), Outputs(x, {"conv": t}), None)
    s, t = (y if y.shape[2] == 2 else y.reshape(2, 6, 2, 2, 2, 2).mean((3, 5)) for y in (s, t))
    torch.testing.assert_close(value, (s - t).square().mean())


def test_the_projector_has_the_papers_three_convolutions() -> None:
    student = Maps(4)
    SimKD("conv").change(student, Maps(6), torch.zeros(2, 3, 4, 4))
    convolutions = [layer for layer in student.conv.projector if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        (4, 3, 1),
        (3, 3, 3),
        (3, 6, 1),
    ]
    assert [type(layer) for layer in student.conv.projector[1:3]] == [nn.BatchNorm2d, nn.ReLU]


def test_the_projector_is_optimized_and_the_classifier_is_not() -> None:
    made, fit = fitted(max_epochs=1)
    optimized = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
    student = made.student
    assert len(optimized) == len({id(p) for p in optimized})
    assert {id(p) for p in student.act.projector.parameters()} <= {id(p) for p in optimized}
    assert not {id(p) for p in student.head.parameters()} & {id(p) for p in optimized}
    assert not list(made.objective.parameters())


def test_a_reused_classifier_stays_in_eval_mode() -> None:
    student, teacher = network(), network(classes=CLASSES, width=12)
    teacher.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, CLASSES))
    simkd().change(student, teacher, samples(4)[0])
    student.train()
    assert student.norm.training
    assert not student.head[0][0].training


def test_a_checkpoint_holds_all_and_loads_into_a_student_that_was_changed_by_hand(tmp_path: Path) -> None:
    made, fit = fitted(max_epochs=1)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    student = simkd().change(network(), good_teacher(), samples(2)[0])
    student.load_state_dict(load_student(tmp_path / "last.ckpt"))
    assert_equal(weights(student), weights(made.student))
    x = samples(6)[0]
    assert torch.equal(student.eval()(x), made.eval()(x))


def test_a_plain_student_is_not_what_the_checkpoint_holds(tmp_path: Path) -> None:
    _, fit = fitted(max_epochs=1)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match=r"act\.projector"):
        network().load_state_dict(load_student(tmp_path / "last.ckpt"))


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = fitted(max_epochs=3)
    _, fit = fitted(max_epochs=2)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    resumed = module()
    trainer(max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert_equal(weights(resumed.student), weights(whole.student))


def test_a_second_training_goes_on_with_the_changed_student() -> None:
    made, _ = fitted(max_epochs=1)
    names = list(made.student.state_dict())
    trainer(max_epochs=1).fit(made, loader())
    assert list(made.student.state_dict()) == names


def test_a_student_that_was_changed_by_hand_is_trained_as_it_is() -> None:
    student = simkd().change(network(), good_teacher(), samples(2)[0])
    names = list(student.state_dict())
    made = DistillationModule(student, good_teacher(), {"simkd": simkd(), "hard_label": HardLabel()}, sgd)
    trainer(max_epochs=1).fit(made, loader())
    assert list(student.state_dict()) == names


def test_what_is_exported_answers_through_the_teachers_classifier() -> None:
    student = simkd().change(network(), good_teacher(), samples(2)[0]).eval()
    x = samples(8)[0]
    program = torch.export.export(student, (x,))
    torch.testing.assert_close(program.module()(x), student(x))
    assert "head.0.weight" in program.state_dict


def test_zero_where_the_projected_features_equal_the_teachers() -> None:
    f = wave((2, 6, 4, 4), 0.3, 0.1).requires_grad_()
    value = SimKD("conv")(Outputs(f, {"conv": f}), Outputs(f, {"conv": f.detach()}), None)
    value.backward()
    assert value == 0
    assert not f.grad.any()


def test_the_published_pair_can_be_changed() -> None:
    teacher = resnet8x4(7)
    student = SimKD("layer3").change(resnet8x4(7), teacher, torch.zeros(2, 3, 32, 32))
    assert student(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_module_that_stays_as_it_is_cannot_have_it() -> None:
    with pytest.raises(ValueError, match=r"losses \['simkd'\] change the student's architecture.*DistillationModule"):
        Distillation(good_teacher(), {"simkd": simkd()})


def test_an_unknown_classifier_is_refused_with_the_nearest_names() -> None:
    losses = {"simkd": SimKD("act", student_classifier="hed")}
    with pytest.raises(ValueError, match=r"loss 'simkd' .*Network has no layer 'hed'.*nearest: head"):
        trainer().fit(DistillationModule(network(), good_teacher(), losses, sgd), loader())


def test_layers_of_different_kinds_and_wrong_reductions_are_refused() -> None:
    loss = SimKD("a")
    vector, maps = (Outputs(wave((2, 3), 1, 0), {"a": wave(shape, 1, 0)}) for shape in ((2, 4), (2, 4, 3, 3)))
    with pytest.raises(ValueError, match=r"layer gives \(2, 4\) and the teacher's \(2, 4, 3, 3\)"):
        loss.build(vector, maps)
    with pytest.raises(ValueError, match="expected reduction of 1 or more, got 0"):
        SimKD("a", reduction=0)
    with pytest.raises(ValueError, match="has 4 channels, expected 5 or more"):
        SimKD("a", reduction=5).build(maps, maps)


@pytest.mark.integration
def test_a_pipeline_tests_and_reuses_the_changed_student(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    layers = {"student_layer": "flatten", "teacher_layer": "hidden"}
    layers |= {"student_classifier": "head", "teacher_classifier": "head"}
    arguments = ["losses=[simkd]", *(f"losses.simkd.{key}={value}" for key, value in layers.items()), "logger=null"]
    printed = kd_lightning(*TINY, *arguments, cwd=folder)
    assert printed.count("reused") == 3
    assert "distilled-simkd-s0: " in printed
    changed = SimKD(**layers).change(CNN8(), CNN64(), torch.zeros(2, 1, 28, 28))
    count = sum(p.numel() for p in changed.parameters())
    (verdict,) = [file for file in folder.glob("mlruns/stages/pipeline-*/verdict.json") if "simkd" in file.read_text()]
    assert json.loads(verdict.read_text())["models"]["distilled"]["params"] == count
    verdict.unlink()
    printed = kd_lightning(*TINY, *arguments, cwd=folder)
    assert printed.count("reused") == 4
    assert json.loads(verdict.read_text())["models"]["distilled"]["params"] == count
