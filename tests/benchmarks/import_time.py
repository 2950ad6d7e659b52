"""What `import kd_lightning` takes over `import lightning.pytorch`: python tests/benchmarks/import_time.py [rounds].

Fresh interpreters, one after the other; the median of the rounds' ratios. Both import torchmetrics, as Lightning does.
"""

import statistics
import subprocess
import sys

CODE = """
import sys, time
start = time.perf_counter()
import {package}
print(time.perf_counter() - start, *sorted({{"mlflow", "hydra", "omegaconf"}} & set(sys.modules)))
"""


def seconds(package: str) -> tuple[float, list[str]]:
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(package=package)], capture_output=True, text=True, check=True
    )
    time, *along = run.stdout.split()
    return float(time), along


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    packages = ("lightning.pytorch", "kd_lightning")
    for package in packages:
        seconds(package)  # compiles, and reads the files into memory
    times: list[list[float]] = []
    for _ in range(rounds):
        measured = [seconds(package) for package in packages]
        times.append([time for time, _ in measured])
    lightning, ours = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"import lightning.pytorch {lightning:.2f} s, import kd_lightning {ours:.2f} s: {ratio:.3f}")
    print("imported along:", ", ".join(measured[1][1]) or "neither mlflow nor hydra")


if __name__ == "__main__":
    main()
