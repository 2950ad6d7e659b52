import logging
import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Teacher
from kd_lightning.outputs import Outputs, run
from kd_lightning.processor import instructions_in
from kd_lightning.tasks import Batch
from kd_lightning.teachers.accelerate import Way, has_precision
from kd_lightning.teachers.fastest import MAX_ERROR, MAX_KL, differences, fastest
from tests.tiny import assert_equal, distillation, loader, trainer, weights

LAYERS = ["stem", "norm", "act", "pool"]
CPU = torch.device("cpu")
here_bfloat16 = pytest.mark.skipif(
    not has_precision(CPU, torch.bfloat16), reason="this CPU has no instructions for bfloat16"
)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU()
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(self.act(self.norm(self.stem(x))))).flatten(1))


def convolutions() -> Convolutions:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Convolutions()
        net.norm.running_mean.uniform_(-1, 1)
        net.norm.running_var.uniform_(0.5, 2)
        return net.eval()


def images(count: int = 8, size: int = 12) -> Batch:
    return Batch((torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)),), {}, None)


def plain(net: nn.Module, batch: Batch, layers: list[str]) -> Outputs:
    with torch.no_grad():
        return run(net, batch.args, batch.kwargs, layers)


@pytest.mark.parametrize(
    ("options", "max_kl", "max_error"),
    [
        ("channels_last", 1e-9, 1e-5),
        pytest.param("bfloat16", MAX_KL, MAX_ERROR, marks=here_bfloat16),
        pytest.param(["channels_last", "bfloat16"], MAX_KL, MAX_ERROR, marks=here_bfloat16),
        pytest.param(["compile", "channels_last"], 1e-9, 1e-5, marks=pytest.mark.slow),
        ("auto", MAX_KL, MAX_ERROR),
    ],
)
def test_logits_and_features_are_those_of_the_plain_network(
    options: str | list[str], max_kl: float, max_error: float
) -> None:
    batch, teacher = images(), Teacher(convolutions(), accelerate=options)
    for layers in ([], LAYERS, []):
        expected, outputs = plain(convolutions(), batch, layers), teacher(batch, layers)
        kl, error = differences(expected, outputs)
        assert abs(kl) <= max_kl
        assert error <= max_error
        assert all(x.dtype == torch.float32 for x in (outputs.logits, *outputs.features.values()))
        assert [*outputs.features] == layers
    assert_equal(weights(teacher.network), weights(convolutions()))  # a loss may look into them


@pytest.mark.parametrize("options", ["channels_last", "auto", pytest.param("bfloat16", marks=here_bfloat16)])
def test_outputs_can_be_saved_for_a_backward_pass(options: str) -> None:
    outputs = Teacher(convolutions(), accelerate=options)(images(), ["stem"])
    weight = torch.ones(8, 10, requires_grad=True)
    ((weight * outputs.logits).sum() + (weight[:, :1] * outputs.features["stem"].flatten(1)).sum()).backward()
    assert weight.grad is not None


class Prefers(Convolutions):
    """Loses some milliseconds in the memory format that it does not like."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.likes = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        if not self.body.weight.is_contiguous(memory_format=self.likes):
            time.sleep(0.05)
        return super().forward(x)


@pytest.mark.parametrize("channels_last", [True, False])
def test_auto_picks_what_is_faster_here(channels_last: bool) -> None:
    assert fastest(Prefers(channels_last).eval(), images()).channels_last == channels_last


class Fragile(Convolutions):
    """Slow as it is, and without its result in a lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            time.sleep(0.05)
        y = self.stem(x)
        return super().forward(x) + ((y + 1e5) - 1e5).mean((2, 3))[:, :10]


class Refusing(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("not implemented for 'BFloat16'\n and a trace")
        return super().forward(x)


@here_bfloat16
@pytest.mark.parametrize(("kind", "said"), [(Fragile, "bfloat16 (differs: KL"), (Refusing, "bfloat16 (fails: not imp")])
def test_auto_leaves_out_what_changes_the_results_or_fails(kind: type[Convolutions], said: str, caplog) -> None:
    caplog.set_level(logging.INFO)
    assert fastest(kind().eval(), images()).dtype is None
    assert said in caplog.text


def test_auto_does_not_touch_a_training_in_half_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert fastest(convolutions(), images(size=4)).dtype is None
    batch = Batch((images().args[0].bfloat16(),), {}, None)
    assert Teacher(convolutions().bfloat16(), accelerate="auto")(batch).logits.dtype == torch.bfloat16


class Draws(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-9 * torch.rand(())


def test_auto_picks_once_for_each_set_of_layers_says_so_and_leaves_no_trace(caplog) -> None:
    caplog.set_level(logging.INFO)
    teacher = Teacher(Draws(), accelerate="auto")
    torch.manual_seed(0)
    teacher(images())
    drawn = torch.rand(())
    torch.manual_seed(0)
    torch.rand(())
    assert drawn == torch.rand(())  # one forward pass has drawn, not those that were timed
    assert len(caplog.records) == 1
    assert "accelerate='auto' picked" in caplog.text
    assert " ms" in caplog.text
    teacher(images(3))
    assert len(caplog.records) == 1
    teacher(images(), ["stem"])
    teacher(images(3), ["stem"])
    assert len(caplog.records) == 2
    assert "layers stem" in caplog.records[1].message


def test_a_network_without_convolutions_is_accelerated_too() -> None:
    with_auto = trainer(max_epochs=2)
    module = distillation(teacher=Teacher(distillation().teacher.network, accelerate="auto"))
    with_auto.fit(module, loader(), loader())
    expected = distillation()
    trainer(max_epochs=2).fit(expected, loader(), loader())
    torch.testing.assert_close(weights(module.student), weights(expected.student), rtol=0.02, atol=0.02)


def test_an_infinite_output_is_never_equal() -> None:
    logits = torch.tensor([[1.0, 2.0]])
    assert differences(Outputs(logits), Outputs(torch.tensor([[1.0, float("nan")]]))) == (float("inf"), float("inf"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("processor : 0\nFeatures\t: fp asimd i8mm bf16 dgh\n", True),
        ("model name : bf16\n", False),
    ],
)
def test_bfloat16_is_for_a_cpu_that_has_instructions_for_it(tmp_path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_precision(CPU, torch.bfloat16, instructions_in(tmp_path / "cpuinfo")) == expected
    assert not has_precision(CPU, torch.bfloat16, instructions_in(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("fast", r"expected accelerate to be 'auto', or some of channels_last, bfloat16, float16, compile; got 'fast'"),
        (["auto", "compile"], r"got 'auto'"),
        (["bfloat16", "float16"], r"expected one precision in accelerate, got bfloat16 and float16"),
    ],
)
def test_unknown_options_are_refused(options: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(convolutions(), accelerate=options)


def test_a_precision_that_would_be_emulated_is_refused_before_the_first_step() -> None:
    module = distillation(teacher=Teacher(convolutions(), accelerate="float16"))
    with pytest.raises(ValueError, match=r"accelerate='float16' expects a device with instructions for it, got 'cpu'"):
        module.teacher.to(CPU)


def test_named_options_are_ways() -> None:
    assert str(Way(True, torch.bfloat16)) == "channels_last + bfloat16"
    assert str(Way()) == "plain"


def test_a_student_in_channels_last_learns_the_same() -> None:
    """The weights' format is enough: a convolution hands it on, whatever its input has."""
    batches = DataLoader(TensorDataset(images(32).args[0], torch.arange(32) % 10), batch_size=8)

    def trained(memory_format: torch.memory_format) -> Convolutions:
        student = convolutions().train().to(memory_format=memory_format)
        seen: list[bool] = []
        student.body.register_forward_hook(
            lambda _module, _args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        module = distillation(student, Teacher(convolutions(), accelerate="channels_last"), check_teacher=False)
        trainer(max_epochs=3).fit(module, batches)
        assert all(seen) == (memory_format == torch.channels_last)
        return student

    expected, got = trained(torch.contiguous_format), trained(torch.channels_last)
    assert got.body.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights(got), weights(expected), rtol=1e-4, atol=1e-5)
