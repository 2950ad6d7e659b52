"""Choose each method's setting on the validation images: python tests/benchmarks/choose_settings.py methods [override].

Takes the variants of experiment=fashion_mnist/<name> and tries six settings of each, trained with seeds 10 and 11
unless an override says otherwise: two weights at three temperatures for a loss that has a temperature, six weights for
another, six amounts for label smoothing; weights as multiples of the yaml's, so the authors'. Prints the mean
validation accuracy of each, and the best as the overrides that go into the experiment. No test image is looked at.
"""

import sys
import warnings
from itertools import product
from typing import Any

import hydra
from omegaconf import OmegaConf
from rich.console import Console

from kd_lightning.cli import conf_dir, pipeline

TEMPERATURES, FEW = (1.0, 2.0, 4.0), (0.3, 1.0)
MANY = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SMOOTHING = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)


def settings(changes: dict[str, Any]) -> list[dict[str, float]]:
    """Return what is tried of a variant: of its last loss, the one beside KD and the labels."""
    if "losses" not in changes:
        return [{"losses.hard_label.label_smoothing": amount} for amount in SMOOTHING]
    name = changes["losses"][-1]
    loss = OmegaConf.load(conf_dir() / "losses" / f"{name}.yaml")[name]
    weight = changes.get(f"losses.{name}.weight", loss.weight)

    def weighted(factor: float) -> dict[str, float]:
        return {f"losses.{name}.weight": float(f"{factor * weight:.3g}")}

    if "temperature" not in loss:
        return [weighted(factor) for factor in MANY]
    return [{f"losses.{name}.temperature": t, **weighted(factor)} for t, factor in product(TEMPERATURES, FEW)]


def main(experiment: str, overrides: list[str]) -> None:
    given = [f"experiment=fashion_mnist/{experiment}", "seeds=[10,11]", "logger=null", "reference=null"]
    given += ["stages=[teacher,distilled,verdict]", *overrides]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = hydra.compose("config", given)
        tried, owner = {}, {}
        for label, changes in OmegaConf.to_container(config.variants).items():
            for i, setting in enumerate(settings(changes)):
                tried[f"{label} {i}"] = {**changes, **setting}
                owner[f"{label} {i}"] = label, setting
        OmegaConf.update(config, "variants", tried, merge=False)
        job = pipeline(config, overrides=given)
    job.console = Console(quiet=True)
    models = job.run().models
    for label in dict.fromkeys(label for label, _ in owner.values()):
        results = [(models[key].val_accuracy, setting) for key, (of, setting) in owner.items() if of == label]
        for accuracy, setting in results:
            print(f"{label:16} {100 * accuracy:.1f}  {setting}")
        best = max(results, key=lambda result: result[0])[1]
        print(f"{label:16} -> {', '.join(f'{path}: {value}' for path, value in best.items())}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2:])
