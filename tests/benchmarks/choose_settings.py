"""Search each method's setting on the validation images: python -m tests.benchmarks.choose_settings methods [override].

The variants of experiment=fashion_mnist/<name> all have the same budget. The first setting tried is the authors', the
others are drawn by Optuna's scrambled Sobol sequence (extra `search`), all ranges log-uniform, the hard label's weight
0.1 or 1. Each is trained with the first seed; the best few also with the further ones (successive halving), and the
best mean over the trainings of full length is the method's setting. Beside KD, a method is searched with KD as it was
chosen. No test image is looked at, and no seed of the tables (0 to 4).

Every training is a line of the file of results as soon as it is finished: the same command goes on from there.
"""

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from hydra.utils import instantiate

from tests.benchmarks.bare_training import Job, validation_accuracy

Setting = dict[str, float]

HARD_LABEL = "losses.hard_label.weight"


class Searched(NamedTuple):
    """A number of a setting: its authors' value, and the range that is searched."""

    authors: float
    low: float
    high: float


def _weight(loss: str, authors: float, low: float, high: float) -> dict[str, Searched]:
    return {f"losses.{loss}.weight": Searched(authors, low, high)}


def _temperature(loss: str, authors: float, high: float = 8) -> dict[str, Searched]:
    return {f"losses.{loss}.temperature": Searched(authors, 1, high)}


FEATURES: Mapping[str, dict[str, Searched]] = {
    "FitNet": _weight("hint", 100, 0.1, 100),
    "AT": _weight("at", 1000, 1, 1000),
    "RKD": {**_weight("rkd", 1, 0.1, 10), "losses.rkd.angle_weight": Searched(50, 12.5, 200)},  # distances: 25
    "PKT": _weight("pkt", 3e4, 3e3, 3e6),
    "CRD": {**_weight("crd", 0.8, 0.03, 3), "losses.crd.tau": Searched(0.07, 0.05, 0.3)},
}
"""Beside the hard label, and, with KD as it was chosen, beside both."""

SEARCHED: Mapping[str, dict[str, Searched]] = {
    "KD": {**_temperature("kd", 4), **_weight("kd", 0.9, 0.1, 10)},
    "label smoothing": {"losses.hard_label.label_smoothing": Searched(0.1, 0.01, 0.5)},
    "KD standardised": {**_temperature("kd", 2), **_weight("kd", 9, 0.3, 30)},
    "CTKD": {**_weight("ctkd", 0.9, 0.1, 10), "losses.ctkd.span": Searched(20, 4, 40)},
    # With the weight, beta alone reaches every ratio of the two parts.
    "DKD": {**_temperature("dkd", 4), **_weight("dkd", 1, 0.1, 10), "losses.dkd.beta": Searched(8, 0.25, 8)},
    "NKD": {**_temperature("nkd", 1), **_weight("nkd", 1, 0.1, 10), "losses.nkd.gamma": Searched(1.5, 0.25, 4)},
    "DIST": {**_temperature("dist", 4), **_weight("dist", 1, 0.1, 10), "losses.dist.gamma": Searched(1, 0.25, 4)},
    "TTM": {"losses.ttm.gamma": Searched(0.1, 0.1, 1), **_weight("ttm", 45, 1, 100)},
    "WTTM": {"losses.wttm.gamma": Searched(0.2, 0.1, 1), **_weight("wttm", 4, 0.3, 30)},
    "RLD": {**_temperature("rld", 4), **_weight("rld", 1, 0.1, 10), "losses.rld.beta": Searched(8, 0.25, 8)},
    **FEATURES,
    **{f"KD + {name}": searched for name, searched in FEATURES.items()},
}
LOW_HARD_LABEL = ("KD", "KD standardised", "CTKD")
"""Whose authors weigh the hard label 0.1, where those of the others weigh it 1."""


def settings(label: str, count: int, kd: Setting | None = None) -> list[Setting]:
    """Return what is tried of a variant: its authors' setting first; ``kd`` is what was chosen of KD."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=0, warn_independent_sampling=False)
    study = optuna.create_study(sampler=sampler)
    searched, beside_kd = SEARCHED[label], label.startswith("KD + ")
    study.enqueue_trial(
        {path: number.authors for path, number in searched.items()} | {"low": int(label in LOW_HARD_LABEL)}
    )
    found = []
    for _ in range(count):
        trial = study.ask()
        setting = dict(kd) if beside_kd and kd is not None else {}
        if not beside_kd and label != "label smoothing":  # of which the whole weight is the hard label's
            setting[HARD_LABEL] = 0.1 if trial.suggest_int("low", 0, 1) else 1.0
        for path, number in searched.items():
            setting[path] = float(f"{trial.suggest_float(path, number.low, number.high, log=True):.3g}")
        if label == "RLD":  # as its authors have it
            setting["losses.rld.scd_temperature"] = setting["losses.rld.temperature"]
        study.tell(trial, 0.0)  # which the sequence does not depend on
        found.append(setting)
    return found


class Search:
    """All trainings of a search, those of the file of results among them.

    Args:
        job: Its experiment's variants are searched.
        seeds: The first for all settings, the others for the finalists.
        count: Settings of each method.
        finalists: How many of them are trained with the further seeds.
        first_steps: Of the trainings with the first seed; None for the full length.
        results: The file.
    """

    def __init__(
        self, job: Job, seeds: list[int], count: int, finalists: int, first_steps: int | None, results: Path
    ) -> None:
        self.job, self.seeds, self.count, self.finalists = job, seeds, count, finalists
        self.first_steps, self.results = first_steps, results
        lines = results.read_text().splitlines() if results.is_file() else []
        self.done = {line[: line.index(', "validation"')]: json.loads(line)["validation"] for line in lines}

    def run(self) -> dict[str, Setting]:
        """Return each method's setting; KD's first, the others' in turn, so that a search that is cut off is fair."""
        labels = [label for label in SEARCHED if label in self.job.trainings]
        chosen = {"KD": self._choose("KD", self._first_round("KD", range(self.count), None), None)}
        tried: dict[str, list[tuple[float, Setting]]] = {label: [] for label in labels if label != "KD"}
        for i in range(self.count):
            for label, so_far in tried.items():
                so_far += self._first_round(label, range(i, i + 1), chosen["KD"])
        return chosen | {label: self._choose(label, so_far, chosen["KD"]) for label, so_far in tried.items()}

    def _first_round(self, label: str, which: range, kd: Setting | None) -> list[tuple[float, Setting]]:
        found = settings(label, which.stop, kd)[which.start :]
        return [(self._accuracy(label, setting, self.seeds[0], self.first_steps), setting) for setting in found]

    def _choose(self, label: str, tried: list[tuple[float, Setting]], kd: Setting | None) -> Setting:
        best = sorted(tried, key=lambda pair: -pair[0])[: self.finalists]
        means = []
        for first, setting in best:
            further = [self._accuracy(label, setting, seed, None) for seed in self.seeds[1:]]
            full = further if self.first_steps is not None else [first, *further]
            means.append(sum(full) / len(full))
        accuracy, (_, setting) = max(zip(means, best, strict=True), key=lambda pair: pair[0])
        print(f"{label:16} {100 * accuracy:.1f}  {setting}", flush=True)
        return setting

    def _accuracy(self, label: str, setting: Setting, seed: int, steps: int | None) -> float:
        """Return the validation accuracy, trained now unless it is in the file."""
        what = json.dumps({"label": label, "setting": setting, "seed": seed, "steps": steps})[:-1]
        if what not in self.done:
            training = replace(with_setting(self.job.trainings[label], setting), seed=seed)
            network = self.job.train(training, steps)
            self.done[what] = validation_accuracy(network, self.job.data)
            with self.results.open("a") as file:
                file.write(f'{what}, "validation": {self.done[what]:.4f}}}\n')
        return self.done[what]


def with_setting(training: Any, setting: Setting) -> Any:
    """Return the training with other numbers of its losses."""
    losses = {name: dict(loss) for name, loss in training.config["losses"].items()}
    for path, value in setting.items():
        _, name, attribute = path.split(".")
        losses[name][attribute] = value
    return replace(training, losses=partial(instantiate, losses, _convert_="all"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["methods", "methods_unlabelled"])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--settings", type=int, default=8)
    parser.add_argument("--finalists", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--first-steps", type=int)
    parser.add_argument("--results", type=Path, default=None)
    given = parser.parse_args()
    results = given.results or Path(f"{given.experiment}.jsonl")
    Search(
        Job(given.experiment, given.overrides), given.seeds, given.settings, given.finalists, given.first_steps, results
    ).run()
