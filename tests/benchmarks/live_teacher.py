"""What a step with a live teacher costs over a bare torch loop.

Run: python tests/benchmarks/live_teacher.py [rounds [variant ...]]

The bare loop is eager and channels first, with float32 networks. Its step is taken after each of the Trainer's, in one
process on one thread, so that whatever else the machine does slows both. Of each variant the median of the rounds'
ratios is printed, with the lowest and the highest, and how far its teacher's probabilities are from the float
teacher's: KL divergence in nats at temperature 1 and 4, on the batches that are trained on.

The teacher has learnt these batches by heart, so that its logits are as far apart as those of a trained one.
"""

import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from step_overhead import THREADS, Between, bare_steps, data, optimizer, trainer
from torch import Tensor, nn

from kd_lightning import DistillationModule, Teacher
from kd_lightning.losses import KD, HardLabel
from kd_lightning.models import resnet8x4, resnet32x4
from kd_lightning.tasks import Batch
from kd_lightning.teachers import TeacherSource
from kd_lightning.teachers.accelerate import has_precision
from kd_lightning.teachers.runtime import RuntimeTeacher

PAIR = "resnet32x4 -> resnet8x4"
BATCH_SIZE, STEPS, EPOCHS = 32, 2, 8


@cache
def trained_weights() -> dict[str, Tensor]:
    network, loader = channels_last(resnet32x4()), data(BATCH_SIZE)
    faster = torch.autocast("cpu", torch.bfloat16, enabled=has_precision(torch.device("cpu"), torch.bfloat16))
    stepper = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for x, y in loader:
            stepper.zero_grad()
            with faster:
                wrong = F.cross_entropy(network(x), y)
            wrong.backward()
            stepper.step()
    with torch.no_grad():
        right = sum(int((network.eval()(x).argmax(-1) == y).sum()) for x, y in loader)
    print(f"the teacher has learnt {right} of {len(loader.dataset)} samples", flush=True)
    return network.state_dict()


def teacher_network() -> nn.Module:
    network = resnet32x4()
    network.load_state_dict(trained_weights())
    return network.eval()


def channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def through(runtime: str) -> Callable[[nn.Module], TeacherSource]:
    """Calibrated ahead of the steps that are timed."""

    def make(network: nn.Module) -> TeacherSource:
        source, loader = RuntimeTeacher(network, runtime=runtime, calibration_samples=4 * BATCH_SIZE), data(BATCH_SIZE)
        for x, _ in [*loader, next(iter(loader))]:
            source(Batch((x,), {}, None))
        return source

    return make


VARIANTS: dict[str, tuple[Callable[[nn.Module], TeacherSource], bool]] = {  # teacher; student in channels_last?
    "plain": (Teacher, False),
    "channels_last": (lambda network: Teacher(network, accelerate="channels_last"), False),
    "channels_last, student too": (lambda network: Teacher(network, accelerate="channels_last"), True),
    "auto": (lambda network: Teacher(network, accelerate="auto"), False),
    "auto, student in channels_last": (lambda network: Teacher(network, accelerate="auto"), True),
    "int8, ONNX Runtime": (through("onnxruntime"), False),
    "int8, OpenVINO": (through("openvino"), False),
    "int8, OpenVINO, student in channels_last": (through("openvino"), True),
}


def kl(expected: Tensor, got: Tensor, temperature: float) -> float:
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (expected, got))
    return F.kl_div(q, p, reduction="batchmean", log_target=True).item()


def compare(variant: str, rounds: int) -> None:
    make, student_too = VARIANTS[variant]
    loader = data(BATCH_SIZE)
    source = make(teacher_network())
    student = channels_last(resnet8x4()) if student_too else resnet8x4()
    losses = {"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=4.0, weight=0.9)}
    module = DistillationModule(student, source, losses, optimizer, check_teacher=False)
    bare = teacher_network()
    between = Between(bare_steps(bare, resnet8x4(), loader), STEPS)
    trainer(max_steps=rounds * STEPS + 2, callbacks=[between], logger=False).fit(module, loader)
    with torch.no_grad():
        expected = torch.cat([bare(x) for x, _ in loader])
    got = torch.cat([source(Batch((x,), {}, None)).logits for x, _ in loader])
    ratios = between.ratios()
    print(
        f"{variant:40} {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of a bare step of "
        f"{1e3 * statistics.median(between.theirs):.0f} ms; KL {kl(expected, got, 1):.1e}, at T = 4 "
        f"{kl(expected, got, 4):.1e}",
        flush=True,
    )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{PAIR}, batch {BATCH_SIZE}, {THREADS} thread, {rounds} rounds of {STEPS} steps; torch {torch.__version__}")
    for variant in sys.argv[2:] or VARIANTS:
        compare(variant, rounds)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "teacher" in record.getMessage())
    torch.set_num_threads(THREADS)
    main()
