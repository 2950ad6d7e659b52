"""What losses of a large vocabulary cost without whole logits: python tests/benchmarks/fused_linear_kl.py [rounds].

2048 tokens, 32768 classes, one thread, float32, memory as by default. Naive: the logits of all tokens, then the loss;
matmul alone: the products that the fused loss takes, in the same chunks, without a loss. Time is that of forward and
backward, the three in turn in each round: the median of the rounds' ratios is printed, with the lowest and the highest.
The peak is what one step adds to a process of its own, gradients included, inputs not.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from kd_lightning.losses import (
    forward_kl,
    fused_linear_divergence,
    fused_linear_kl,
    fused_linear_top_k_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    top_k_kl,
)
from kd_lightning.losses.fused_linear import _rows

N, V, K = 2048, 32768, 20
CASES = [
    ("forward_kl", 64),
    ("forward_kl", 256),
    ("reverse_kl", 64),
    ("skewed_forward_kl", 64),
    ("jensen_shannon", 64),
    ("top_k_kl", 64),
]
DIVERGENCES = {f.__name__: f for f in (forward_kl, reverse_kl, skewed_forward_kl, jensen_shannon)}
# glibc then returns each tensor's memory at once; else its heap, and not the tensors, decides on the peak.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def steps(name: str, width: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    hidden, head = torch.randn(N, width), torch.randn(V, width) / width**0.5
    teacher, teacher_head = torch.randn(N, width), torch.randn(V, width) / width**0.5
    best = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    log_probs = (0.9 * torch.randn(N, K).softmax(-1)).log()
    inputs = hidden.requires_grad_(), head.requires_grad_()

    def naive() -> None:
        for x in inputs:
            x.grad = None
        logits = hidden @ head.T
        if name == "top_k_kl":
            loss = top_k_kl(logits, best, log_probs)
        else:
            loss = DIVERGENCES[name](logits, teacher @ teacher_head.T)
        loss.backward()

    def fused() -> None:
        for x in inputs:
            x.grad = None
        if name == "top_k_kl":
            loss = fused_linear_top_k_kl(hidden, head, best, log_probs)
        elif name == "forward_kl":
            loss = fused_linear_kl(hidden, head, teacher, teacher_head)
        else:
            loss = fused_linear_divergence(DIVERGENCES[name], hidden, head, teacher, teacher_head)
        loss.backward()

    sides = [(hidden, head, None), (teacher, teacher_head, None)][: 1 if name == "top_k_kl" else 2]
    rows = _rows(None, None, sides)

    @torch.no_grad()
    def matmul() -> None:
        of_hidden, of_head = torch.zeros_like(hidden), torch.zeros_like(head)
        for start in range(0, N, rows):
            chunk = slice(start, start + rows)
            logits = [F.linear(h[chunk], weight) for h, weight, _ in sides]
            of_hidden[chunk] = logits[0] @ head
            of_head.addmm_(logits[0].mT, hidden[chunk])
            del logits

    return {"naive": naive, "matmul": matmul, "fused": fused}


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def print_peak(name: str, width: int, kind: str) -> None:
    """Print the megabytes that one step adds to this process at its peak."""
    run = steps(name, width)[kind]
    x = torch.randn(64, 64, requires_grad=True)
    (x @ x).sum().backward()  # what libraries allocate for good is no part of a step
    # Imports have held more than the process holds now, and would hide a step's peak: fill up to theirs.
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    filling = torch.ones(max(0, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held), dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    del filling
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peak(name: str, width: int, kind: str) -> float:
    command = [sys.executable, __file__, "--peak", name, str(width), kind]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **GIVE_BACK})
    return float(run.stdout)


def main(rounds: int) -> None:
    print("| loss | hidden | peak: naive | matmul alone | fused | / naive | / matmul alone | time / naive | / matmul |")
    print("|" + "---|" * 9)
    for name, width in CASES:
        naive, matmul, fused = (peak(name, width, kind) for kind in ("naive", "matmul", "fused"))
        runs = steps(name, width)
        for run in runs.values():
            run()
        times = [{kind: seconds(run) for kind, run in runs.items()} for _ in range(rounds)]
        of_naive, of_matmul = (spread([t["fused"] / t[kind] for t in times]) for kind in ("naive", "matmul"))
        memory = f"{naive:.0f} MB | {matmul:.0f} MB | {fused:.0f} MB | {fused / naive:.2f} | {fused / matmul:.2f}"
        print(f"| `{name}` | {width} | {memory} | {of_naive} | {of_matmul} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
