"""What each loss costs, in time and in memory, as a multiple of `kd`: python tests/benchmarks/losses.py [rounds].

Time is the processor's for forward and backward, on one thread, with `kd` on (64, 100) logits timed by turns with each
loss in every round: of the rounds' ratios the median is printed, with the lowest and the highest. Memory is the most
that forward and backward hold at once by PyTorch's allocator, gradients included, inputs and parameters not.

The losses are those of conf/losses/ as they are there, with one pair of layers; with two where a loss relates layers.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_lightning.losses import DistillationLoss, forward_kl, fused_linear_kl
from kd_lightning.outputs import Outputs, Samples

CONF = Path(__file__).parents[2] / "conf" / "losses"
TOKENS = (
    "forward_kl", "reverse_kl", "symmetric_kl", "skewed_forward_kl", "skewed_reverse_kl", "jensen_shannon",
    "total_variation", "top_k_kl", "uld",
)  # fmt: skip
SEVERAL = ("fsp", "review_kd")  # relate a layer to the next
FILLED = {"student_layer": "layer", "student_classifier": "fc", "teacher_classifier": "fc"}
TRAINING_SET = 50_000  # what the memory banks of crd hold
TURNS, TURN_S = 5, 0.01  # of each side of a round's ratio

# By a part of operators' names. What remains goes element by element, or sums.
KINDS = {
    "matrix products": "mm", "convolutions": "convolution", "indexing": "index", "sorting": "sort", "pooling": "pool",
    "distances": "cdist",
}  # fmt: skip
Step = Callable[[], None]


class Sizes(NamedTuple):
    """B samples, C classes; maps of D channels, H high and W wide; or S tokens a sample."""

    B: int
    C: int
    D: int = 64
    H: int = 8
    W: int = 8
    S: int = 0


class MadeTensors(TorchDispatchMode):
    """Notes the shapes of the tensors that operators make: neither views nor what is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def tensors(tree: Any) -> list[Tensor]:
            return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]

        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.shapes |= {x.shape for x in tensors(result) if x.untyped_storage().data_ptr() not in given}
        return result


def network(sizes: Sizes, layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layer": layer, "fc": nn.Linear(sizes.D, sizes.C)})


def make(name: str) -> DistillationLoss:
    config = OmegaConf.load(CONF / f"{name}.yaml")[name]
    filled = {**FILLED, "student_layers": ["layer"] * (2 if name in SEVERAL else 1)}
    filled["teacher_layer"], filled["teacher_layers"] = filled["student_layer"], filled["student_layers"]
    for key in config:
        if OmegaConf.is_missing(config, key) or (name == "cwd" and key in filled):
            config[key] = filled[key]
    return instantiate(config)


def step(loss: DistillationLoss, sizes: Sizes) -> Step:
    """Return forward and backward of a loss that was built for these sizes."""
    torch.manual_seed(0)
    shape = (sizes.B, sizes.S, sizes.C) if sizes.S else (sizes.B, sizes.C)
    maps = (sizes.B, sizes.D, sizes.H, sizes.W)
    student, teacher = network(sizes, nn.Identity()), network(sizes, nn.BatchNorm2d(sizes.D))
    z_s, z_t, f_s, f_t = 3 * torch.randn(shape), 3 * torch.randn(shape), torch.randn(maps), torch.randn(maps)
    inputs = (z_s.requires_grad_(), f_s.requires_grad_()) if loss.student_layers else (z_s.requires_grad_(),)
    target = torch.randint(sizes.C, shape[:-1])
    samples = Samples(torch.randperm(TRAINING_SET)[: sizes.B], TRAINING_SET)

    def outputs() -> tuple[Outputs, Outputs]:
        # Through the layer: a loss may have appended a projector to it.
        features = {"layer": student["layer"](f_s)} if loss.student_layers else {}
        return Outputs(z_s, features, samples), Outputs(z_t, {"layer": f_t})

    loss.build(*outputs())
    loss.attach(student, teacher)
    learnt = [*inputs, *loss.parameters(), *student.parameters()]

    def run() -> None:
        loss(*outputs(), target).backward()
        for x in learnt:
            x.grad = None

    return run


def seconds(run: Step, count: int) -> float:
    # The processor's, as other processes want it too. Backward runs on this thread.
    start = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - start) / count


def compare(run: Step, beside: Step, rounds: int) -> list[float]:
    """Return the ratio of the times, round by round."""
    pair = run, beside
    counts = [max(1, round(TURN_S / seconds(x, 3))) for x in pair]
    turns = [[[seconds(*x) for x in zip(pair, counts, strict=True)] for _ in range(TURNS)] for _ in range(rounds)]
    return [sum(turn[0] for turn in a_round) / sum(turn[1] for turn in a_round) for a_round in turns]


def memory(run: Step) -> int:
    """Return the peak of the bytes that are allocated, also by what runs within an operator."""
    run()  # what is made once is no part of a step
    with profile(profile_memory=True) as found:
        run()
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    return max(accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())))


def most_time(run: Step) -> str:
    """Return the kind of operator in which most of the time goes, and the median of its share."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(5):
        with profile() as profiled:
            for _ in range(5):
                run()
        operators = profiled.key_averages()
        total = sum(x.self_cpu_time_total for x in operators)
        for kind, part in KINDS.items():
            found[kind].append(sum(x.self_cpu_time_total for x in operators if part in x.key) / total)
    shares = {kind: statistics.median(values) for kind, values in found.items()}
    kind = max(shares, key=shares.__getitem__)
    return f"{kind} {shares[kind]:.0%}" if shares[kind] >= 0.2 else "elements, sums"


def in_letters(shape: torch.Size, sizes: Sizes) -> str:
    """Return a shape by the names of its sizes, which have to be told apart."""
    names = {v: k for k, v in sizes._asdict().items()} | {sizes.H * sizes.W: "H·W", sizes.B * sizes.S: "B·S"}
    names |= {sizes.D * sizes.H * sizes.W: "D·H·W", 2 * sizes.D: "2D", sizes.D // 2: "D/2", sizes.C - 1: "C"}
    return "·".join(names.get(n, str(n)) for n in shape if n != 1) or "1"


def largest(name: str, sizes: Sizes) -> str:
    """Return the largest tensor that a step makes, beside those of the inputs' size."""
    distinct = sizes._replace(B=5) if sizes.S else sizes._replace(B=61, C=sizes.C + 3, D=67, H=7, W=9)
    run = step(make(name), distinct)
    with MadeTensors() as made:
        run()
    rows = distinct.B * max(distinct.S, 1)
    inputs = {rows * distinct.C, rows * (distinct.C - 1), distinct.B * distinct.D * distinct.H * distinct.W}
    return in_letters(max((x for x in made.shapes if x.numel() not in inputs), key=torch.Size.numel), distinct)


def is_too_large(shape: str) -> bool:
    """Return whether a shape is that of B²·D or (B·C)² elements."""
    sizes = shape.split("·")
    return sizes.count("B") > 1 and ("D" in sizes or sizes.count("C") > 1)


def spread(ratios: list[float]) -> str:
    digits = 2 if statistics.median(ratios) < 9.95 else 0
    middle, low, high = (f"{x:.{digits}f}" for x in (statistics.median(ratios), min(ratios), max(ratios)))
    return f"{middle} ({low}–{high})"


def show(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def head(*cells: str) -> None:
    print()
    show(*cells)
    print("|" + "---|" * len(cells))


def families() -> tuple[list[str], list[str], list[str]]:
    """Return the names of the losses on logits, on features and on tokens."""
    names = sorted(path.stem for path in CONF.glob("*.yaml"))
    features = [name for name in names if make(name).student_layers]
    logits = [name for name in names if name not in (*features, *TOKENS, "kd")]
    return ["kd", *logits], features, ["kd", *TOKENS]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    kd = step(make("kd"), Sizes(64, 100))
    bytes_of_kd = memory(kd)
    found: dict[str, str] = {}

    def cost(name: str, sizes: Sizes) -> tuple[str, str]:
        run = step(make(name), sizes)
        return spread(compare(run, kd, rounds)), f"{memory(run) / bytes_of_kd:.2f}"

    def rest(name: str, sizes: Sizes) -> tuple[str, str]:
        found[name] = largest(name, sizes)
        return found[name], most_time(step(make(name), sizes))

    logits, features, tokens = families()
    few, many, maps, text = Sizes(64, 100), Sizes(64, 1000), Sizes(64, 100), Sizes(4, 1000, S=128)
    last = ("largest tensor beside the inputs'", "most time in")
    head("logits (B, C)", "time, (64, 100)", "memory", "time, (64, 1000)", "memory", *last)
    for name in logits:
        show(name, *cost(name, few), *cost(name, many), *rest(name, many))
    head("features (B, D, H, W)", "time, (64, 64, 8, 8)", "memory", *last)
    for name in features:
        show(name, *cost(name, maps), *rest(name, maps))
    head("tokens (B, S, C)", "time, (4, 128, 1000)", "memory", *last)
    for name in tokens:
        show(name, *cost(name, text), *rest(name, text))
    head_and_hidden(rounds)
    too_large = [name for name, shape in found.items() if is_too_large(shape)]
    print(f"\nHold a tensor of B²·D or (B·C)² elements: {', '.join(too_large) or 'none'}.")


def head_and_hidden(rounds: int) -> None:
    """Compare the fused loss of 512 tokens, a vocabulary of 16000 and a width of 64 with that of their logits."""
    hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(16000, 64, requires_grad=True)
    teacher, teacher_weight = torch.randn(512, 64), torch.randn(16000, 64)

    def fused() -> None:
        fused_linear_kl(hidden, weight, teacher, teacher_weight).backward()
        hidden.grad = weight.grad = None

    def naive() -> None:
        forward_kl(hidden @ weight.T, teacher @ teacher_weight.T).backward()
        hidden.grad = weight.grad = None

    head("hidden (512, 64), head (16000, 64)", "time / forward_kl of the logits", "memory / forward_kl of the logits")
    show("fused_linear_kl", spread(compare(fused, naive, rounds)), f"{memory(fused) / memory(naive):.2f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
