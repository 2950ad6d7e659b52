"""The table of an experiment, in a third of the time: python -m tests.benchmarks.compare_methods methods [override].

Trains what ``kd-lightning experiment=fashion_mnist/methods 'seeds=[0,1,2,3,4]'`` trains, in the bare loop whose weights
are bitwise the pipeline's, and prints the same verdict, without speeds and int8. Every training is a line of the file
of results as soon as it is finished: the same command goes on from there.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from kd_lightning.objective import DistillationObjective
from kd_lightning.pipeline.compare import compare as compared
from kd_lightning.pipeline.training import Training
from kd_lightning.records import Result, Verdict
from kd_lightning.report.terminal import print_verdict
from tests.benchmarks.bare_training import Job, predict, validation_accuracy


def compare(experiment: str, overrides: list[str], seeds: list[int], file: Path) -> Verdict:
    """Return the verdict on an experiment."""
    job = Job(experiment, overrides)
    target = torch.cat([y for _, y in job.data.test_dataloader()]).numpy()
    lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    done = {(line.pop("label"), line.pop("seed"), line.pop("losses")): line for line in lines}
    results = [teacher.result for teacher in job.teachers.values()]
    digest = results[0].target_digest
    for seed in seeds:  # so that a comparison that is cut off has the same seeds of all
        for label, training in job.trainings.items():
            losses = json.dumps(training.config["losses"])
            if (label, seed, losses) not in done:
                done[label, seed, losses] = trained(job, replace(training, seed=seed))
                with file.open("a") as out:
                    line = {"label": label, "seed": seed, "losses": losses, **done[label, seed, losses]}
                    out.write(json.dumps(line) + "\n")
            results.append(_result(training, seed, target, digest, done[label, seed, losses]))
    return compared(results, job.task, reference=job.reference, extra=job.data.unlabelled)


def trained(job: Job, training: Training) -> dict[str, Any]:
    """Train one student; return its validation accuracy, and its test predictions as a string of digits."""
    network = job.train(training)
    temperature = next(iter(DistillationObjective(training.losses()).temperatures().values()), None)
    return {
        "temperature": temperature,
        "entropy": job.entropy(training, temperature) if temperature is not None else None,
        "validation": validation_accuracy(network, job.data),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "predictions": "".join(map(str, predict(network, job.data, "test")[0].tolist())),
    }


def _result(training: Training, seed: int, target: NDArray[np.int64], digest: str, figures: dict[str, Any]) -> Result:
    answers = np.array([int(digit) for digit in figures["predictions"]])
    measured = {"val": figures["validation"], "params": figures["parameters"], "teacher_entropy": figures["entropy"]}
    return Result(
        role=training.role,
        label=training.label,
        method=training.method,
        seed=seed,
        answers=answers,
        scores=(answers == target).astype(np.float64),
        target_digest=digest,
        figures={name: value for name, value in measured.items() if value is not None},
        temperature=figures["temperature"],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="of conf/experiment/fashion_mnist")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    file = given.results or Path(f"{given.experiment}_compared.jsonl")
    print_verdict(compare(given.experiment, given.overrides, given.seeds, file), Console(width=80))
