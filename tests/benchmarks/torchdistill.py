"""Steps of torchdistill and of this package, side by side: python tests/benchmarks/torchdistill.py [rounds [folder]].

torchdistill 1.1.5 comes with pip into an environment of its own, in a temporary folder, or in the one that is named,
where it is used again. It needs torchvision and so a torch of several GB: without room for it, or where pip cannot get
it, nothing is compared, and a message says why. Both train resnet8x4 from resnet32x4 with cross-entropy and KD on the
same images, batch 32, one thread, without logging: torchdistill with its DistillationBox and KDLoss, this package
through Lightning. torchdistill has no cache of a teacher's outputs, so that stored ones compare with its live teacher.

A process each waits for its turn and then takes a step, 5 times a round; of each, the median of the rounds' ratios is
printed, with the lowest and the highest. The environments may hold different torches: a bare loop in each shows what
that does.
"""

import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

VERSION = "1.1.5"
GIGABYTES = 8
STEPS, BATCH_SIZE, IMAGES = 5, 32, 256
HERE = Path(__file__).resolve()


class Turns:
    """Takes a step each time that the parent process asks for it, and tells how long it took."""

    def __init__(self) -> None:
        self.since = 0.0

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # the parent is done
        self.since = time.perf_counter()

    def step(self) -> None:
        print(f"seconds {time.perf_counter() - self.since}", flush=True)
        self.wait()


def networks() -> tuple:
    """Make teacher and student from the one file that holds them, which needs nothing but torch."""
    import importlib.util

    import torch

    path = HERE.parents[2] / "kd_lightning" / "models" / "cifar_resnet.py"
    spec = importlib.util.spec_from_file_location("cifar_resnet", path)
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    torch.manual_seed(0)
    return models.resnet32x4().eval().requires_grad_(False), models.resnet8x4()


def images() -> object:
    import torch
    from torch.utils.data import TensorDataset

    random = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(IMAGES, 3, 32, 32, generator=random), torch.randint(100, (IMAGES,), generator=random)
    )


def bare(turns: Turns) -> None:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    (teacher, student), loader = networks(), DataLoader(images(), BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    for _ in count():
        for x, y in loader:
            with torch.no_grad():
                target = teacher(x)
            logits = student(x)
            soft = F.kl_div((logits / 4).log_softmax(-1), (target / 4).softmax(-1), reduction="batchmean")
            optimizer.zero_grad()
            (0.1 * F.cross_entropy(logits, y) + 0.9 * 16 * soft).backward()
            optimizer.step()
            turns.step()


def torchdistill(turns: Turns) -> None:
    import torch
    from torch.utils.data import RandomSampler
    from torchdistill.core.distillation import get_distillation_box

    teacher, student = networks()
    ends = {f"{who}_module_{what}": where for who in ("teacher", "student") for what, where in ENDS.items()}
    kd = {"key": "KDLoss", "kwargs": {**ends, "temperature": 4.0, "alpha": 0.1, "reduction": "batchmean"}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "images",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH_SIZE},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }
    device = torch.device("cpu")
    box = get_distillation_box(teacher, student, {"images": images()}, config, device, None, False, 1)
    for epoch in count():
        box.pre_epoch_process(epoch=epoch)
        for x, y, extra in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(x, y, extra))
            turns.step()
        box.post_epoch_process()


ENDS = {"path": ".", "io": "output"}


def ours(turns: Turns, teacher: str, student_too: bool = False) -> None:
    import torch
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    from kd_lightning import DistillationModule, Teacher
    from kd_lightning.losses import KD, HardLabel
    from kd_lightning.stored_outputs import StoredOutputs, Views, store_outputs
    from kd_lightning.teachers.stored import Stored

    class InTurn(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            turns.step()

    def optimizer(parameters: Iterator) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    (network, student), dataset = networks(), images()
    if teacher == "stored":
        folder = tempfile.mkdtemp(dir=os.environ["FOLDER"])
        store_outputs(network, dataset, folder)
        dataset, source = StoredOutputs(dataset, folder), Stored()
        loader = DataLoader(dataset, BATCH_SIZE, sampler=Views(dataset))
    else:
        loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)
        source = Teacher(network, accelerate=teacher) if teacher else Teacher(network)
    losses = {"hard_label": HardLabel(weight=0.1), "kd": KD(temperature=4.0, weight=0.9)}
    module = DistillationModule(student, source, losses, optimizer, check_teacher=False)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=-1, callbacks=[InTurn()], logger=False, **quiet)
    trainer.fit(module, loader)


WORKERS: dict[str, Callable[[Turns], None]] = {
    "torchdistill": torchdistill,
    "torchdistill's environment, bare loop": bare,
    "bare loop": bare,
    "live": lambda turns: ours(turns, ""),
    "live, both networks in channels_last": lambda turns: ours(turns, "channels_last", student_too=True),
    "live, accelerate='auto'": lambda turns: ours(turns, "auto"),
    "stored": lambda turns: ours(turns, "stored"),
}


def work(name: str) -> None:
    """Be one of the processes."""
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE.parent]  # this file is no torchdistill
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}", flush=True)
    turns = Turns()
    turns.wait()
    WORKERS[name](turns)


def install(folder: Path) -> Path | None:
    """Return the Python of torchdistill's environment; None, and a message, where it cannot be."""
    python = folder / "bin" / "python"
    if not python.exists():
        free = shutil.disk_usage(folder).free / 1e9
        if free < GIGABYTES:
            print(f"skipped: torchdistill and its torch need {GIGABYTES} GB in {folder}, which has {free:.1f} GB free")
            return None
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", f"torchdistill=={VERSION}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(f"skipped: pip cannot install torchdistill {VERSION}: {' '.join(done.stdout.split()[-60:])}")
            return None
    return python


def turn(process: subprocess.Popen) -> float:
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise RuntimeError(f"{process.args} ended with {process.wait()} before its step was done")


def compare(theirs: Path, rounds: int, folder: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "FOLDER": folder}
    processes = {}
    for name in WORKERS:
        python = str(theirs) if name.startswith("torchdistill") else sys.executable
        path = "" if name.startswith("torchdistill") else str(HERE.parents[2])
        processes[name] = subprocess.Popen(
            [python, str(HERE), "--work", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": path},
        )
    times: dict[str, list[float]] = {name: [] for name in processes}
    try:
        torches = [processes[name].stdout.readline().strip() for name in ("torchdistill", "bare loop")]
        print(f"resnet32x4 -> resnet8x4, batch {BATCH_SIZE}, 1 thread, {rounds} rounds of {STEPS} steps in turn;")
        print(f"torchdistill {VERSION} with {torches[0]}, ours with {torches[1]}", flush=True)
        for process in (*processes.values(), *processes.values()):
            turn(process)  # warms up
        for _ in range(rounds):
            steps = [[turn(process) for process in processes.values()] for _ in range(STEPS)]
            for name, taken in zip(processes, zip(*steps, strict=True), strict=True):
                times[name].append(sum(taken) / STEPS)
    finally:
        for process in processes.values():
            process.kill()
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["torchdistill"], strict=True)]
        print(
            f"{name:38} {1e3 * statistics.median(values):4.0f} ms a step, {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) of torchdistill's, live",
            flush=True,
        )


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as folder:
        place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(folder) / "environment"
        place.mkdir(parents=True, exist_ok=True)
        python = install(place)
        if python is not None:
            compare(python, rounds, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        main()
