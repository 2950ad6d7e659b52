"""All stages, one after the other, under one parent run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor

from kd_lightning.durable_files import remove_leftovers
from kd_lightning.pipeline.checks import check_recipes
from kd_lightning.pipeline.fingerprint import code_of
from kd_lightning.pipeline.latency import Latency, measure
from kd_lightning.pipeline.lock import held_if_free
from kd_lightning.pipeline.progress import StageProgress
from kd_lightning.pipeline.quantizing import QuantizedStage
from kd_lightning.pipeline.recipe import Recipe
from kd_lightning.pipeline.results import Verdict
from kd_lightning.pipeline.run_id import read_run_id, remove_run_id, write_run_id
from kd_lightning.pipeline.runtimes import measure_files
from kd_lightning.pipeline.serving import float_file
from kd_lightning.pipeline.stage import run_stage
from kd_lightning.pipeline.stage_folder import Finished
from kd_lightning.pipeline.table import print_verdict
from kd_lightning.pipeline.teaching import store, with_members
from kd_lightning.pipeline.verdict import make_verdict, write_verdict
from kd_lightning.tasks import Classification
from kd_lightning.tracking.logger import check_writable, safe_name
from kd_lightning.tracking.runs import MakeLogger, Tracking, is_rank_zero


@dataclass(kw_only=True)
class Pipeline:
    """Trains the teacher and then each student, quantises them, and says whether distillation is worth it.

    Attributes:
        name: Of the parent run.
        teacher: None where no stage needs one.
        members: Further teachers of an ensemble; neither rows of the comparison, nor quantised.
        assistants: Networks between teacher and student, each taught by an earlier one, in the order in which they run.
        students: In the order in which they run.
        config: The whole, for the parent run.
        work_dir: Where stages keep their checkpoints and results.
        to_store: Recipes for whose images the teacher's outputs are stored, once it is trained.
        quantized: How they are quantised; None for nothing. With it, files are timed in ONNX Runtime in place of
            networks in PyTorch.
        make_logger: None to log nothing.
        console: Where the comparison is printed.
        verdict: Whether to compare at the end.
        recall_classes: Classes whose recall stands in the comparison.
        reference: Label of the distilled model with which the others are compared; None for no such column.
    """

    name: str
    teacher: Recipe | None
    students: Sequence[Recipe]
    config: Mapping[str, Any]
    work_dir: Path
    members: Sequence[Recipe] = ()
    assistants: Sequence[Recipe] = ()
    to_store: Sequence[Recipe] = ()
    quantized: QuantizedStage | None = None
    make_logger: MakeLogger | None = None
    console: Console = field(default_factory=Console)
    verdict: bool = True
    recall_classes: Sequence[int] = ()
    reference: str | None = None

    def __post_init__(self) -> None:
        known = [recipe.label for recipe in (self.teacher, *self.members) if recipe is not None]
        for recipe in (*self.assistants, *self.students):
            if recipe.needs_teacher and recipe.taught_by == "teacher" and self.teacher is None:
                with recipe.errors("stages"):
                    raise ValueError(
                        f"{recipe.name} needs a teacher: add teacher to the stages, or pass teacher.checkpoint=<its "
                        "weights>"
                    )
            if recipe.needs_teacher and recipe.taught_by not in known:
                with recipe.errors("taught_by"):
                    raise ValueError(f"{recipe.name} is taught by {recipe.taught_by!r}, expected one of {known}")
            if recipe.role == "assistant":
                known.append(recipe.label)
        distilled = list(dict.fromkeys(recipe.label for recipe in self.students if recipe.role == "distilled"))
        if self.verdict and self.reference is not None and self.reference not in distilled:
            raise ValueError(
                f"reference {self.reference!r} is no distilled model, expected one of {distilled}, or none"
            )

    def run(self) -> Verdict | None:
        """Run what is not finished yet.

        Raises:
            ValueError: For whatever :mod:`kd_lightning.preflight` finds in any stage, before the first is trained.
            OSError: When ``work_dir`` cannot be written to, before anything is trained.
        """
        if is_rank_zero():
            for left in (self.work_dir, *self.work_dir.glob("*/")):
                remove_leftovers(left)
        check_writable(self.work_dir, name="work_dir")
        check_recipes(self._recipes(), self.quantized, self.recall_classes)
        for recipe in self._recipes():
            code_of(recipe)  # is read now, ahead of edits during the training: what was imported is what runs
        folder = self.work_dir / f"pipeline-{self._fingerprint()[:12]}"
        # Where another process runs the very same pipeline, this one has a parent run of its own.
        with held_if_free(folder) if is_rank_zero() else nullcontext(False) as alone:
            # The marker is there while the pipeline is under way, and until the store has all of it.
            known = read_run_id(folder, self._fingerprint()) if alone else None
            note = partial(write_run_id, folder, of=self._fingerprint()) if alone else None
            tracking = Tracking(self.make_logger, self.name, self.config, known, note)
            try:
                finished = self._run_stages(tracking)
                if not is_rank_zero():
                    return None
                verdict = self._compare(finished, tracking, folder / "verdict.json") if self.verdict else None
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
                tracking.close("KILLED" if interrupted else "FAILED")
                raise
            if tracking.close("FINISHED") and alone:
                remove_run_id(folder)
            return verdict

    def _recipes(self) -> list[Recipe]:
        return [recipe for recipe in (self.teacher, *self.members, *self.assistants, *self.students) if recipe]

    def _run_stages(self, tracking: Tracking) -> list[Finished]:
        recipes = self._recipes()
        rows = [recipe for recipe in recipes if recipe.label not in {member.label for member in self.members}]
        finished: list[Finished] = []
        by_label: dict[str, Finished] = {}
        console = self.console if is_rank_zero() else Console(quiet=True)
        count = len(recipes) + (self.quantized.count(rows) if self.quantized is not None else 0)
        with StageProgress(console, count) as progress:

            def run(recipe: Recipe) -> Finished:
                progress.begin(recipe.name)
                stage = self._run_one(recipe, by_label, tracking, progress)
                progress.end(recipe.name, _summary(stage))
                return stage

            for recipe in recipes:
                by_label[recipe.label] = stage = run(recipe)
                if recipe in rows:
                    finished.append(stage)
                for waiting in self.to_store:
                    if waiting.taught_by == recipe.label:
                        store(waiting, stage, self.work_dir)
            if self.quantized is not None:
                finished += self.quantized.run(finished, run)
        return finished

    def _run_one(
        self, recipe: Recipe, finished: Mapping[str, Finished], tracking: Tracking, progress: StageProgress
    ) -> Finished:
        tags = {"kd.role": recipe.role, "kd.method": recipe.method, "kd.seed": recipe.seed}
        recipe = with_members(recipe, finished)
        stage = run_stage(
            recipe,
            finished.get(recipe.taught_by or ""),
            self.work_dir,
            lambda run_id, known: tracking.logger(recipe.name, tags, recipe.config, run_id, known),
            [progress],
        )
        if stage.reused:
            tracking.reused(recipe.name, tags, recipe.config, stage.folder.run_id, stage.folder.remember)
        run_id = tracking.runs.get(recipe.name)
        stage = replace(stage, run_id=run_id)  # variants may share a name
        if not stage.reused:
            tracking.artifact(run_id, stage.folder.weights)
            if recipe.quantizing is not None:
                tracking.artifact(run_id, stage.folder.file)
        result = stage.result
        values: dict[str, float | None] = {
            "final/acc": result.accuracy,
            "final/val_acc": result.val_accuracy,
            "final/params": result.parameters,
            "final/size_mb": result.size_mb,
            "final/train_seconds": result.train_seconds,
            "final/teacher_entropy": result.teacher_entropy,
        }
        if result.quantized is not None:
            values |= {
                "final/agreement_fp32": result.quantized.agreement_fp32,
                "final/agreement_file": result.quantized.agreement_file,
                "final/file_mb": result.quantized.file_mb,
                "final/quantized_layers": result.quantized.layers,
                "final/integer_operators": result.quantized.integer_operators,
            }
        reference = stage if recipe.role == "teacher" else finished.get("teacher")
        if reference is not None:
            values["final/agreement"] = float((result.predictions == reference.result.predictions).mean())
            values["final/retention"] = result.accuracy / max(reference.result.accuracy, 1e-12)
        tracking.metrics(run_id, values)
        tracking.text(run_id, json.dumps(recipe.config, indent=2, default=str), "config.json")
        tracking.finish(run_id)
        return stage

    def _compare(self, finished: list[Finished], tracking: Tracking, path: Path) -> Verdict:
        data = finished[0].recipe.data(role="distilled", seed=0)
        data.prepare_data()
        data.setup("validate")
        first_of_label = {stage.result.label: stage for stage in reversed(finished)}
        first_of_label = dict(reversed(first_of_label.items()))
        openvino, files_mb = None, dict[str, float]()
        tracking.settle()
        if self.quantized is None:
            latency = measure({label: stage.network() for label, stage in first_of_label.items()}, _one_sample(data))
        else:
            files = {
                label: stage.folder.file if stage.result.quantized is not None else float_file(stage, data)
                for label, stage in first_of_label.items()
            }
            files_mb = {label: file.stat().st_size / 1e6 for label, file in files.items()}
            measured = measure_files(files, _one_sample(data))
            latency, openvino = measured["onnxruntime"], measured.get("openvino")
        names = getattr(data, "class_names", None)
        verdict = make_verdict(
            [stage.result for stage in finished],
            latency,
            recall_classes={index: names[index] if names else str(index) for index in self.recall_classes},
            reference=self.reference,
            extra_images=int(getattr(data, "counts", {}).get("unlabelled", 0)),
            latency_openvino=openvino,
            files_mb=files_mb,
        )
        write_verdict(verdict, path)
        for stage in finished:
            values = _speed(latency[stage.result.label]) | {"final/file_mb": files_mb.get(stage.result.label)}
            tracking.metrics(stage.run_id, values)
        for label, model in verdict.models.items():
            of_model = {"acc": model.accuracy, "acc_sd": model.sd, "retention": model.retention}
            of_model |= {"gap_closed": model.gap_closed.mean if model.gap_closed else None}
            tracking.metrics(
                tracking.run_id, {f"final/{safe_name(label)}/{key}": value for key, value in of_model.items()}
            )
        tracking.metrics(
            tracking.run_id,
            {
                "final/worth_it": float(verdict.worth_it),
                "final/decided": float(verdict.decided),
                "final/gap_closed": verdict.gap_closed.mean,
                "final/gap_closed_low": verdict.gap_closed.low,
                "final/gap_closed_high": verdict.gap_closed.high,
            },
        )
        tracking.artifact(tracking.run_id, path)
        tracking.tag(tracking.run_id, "mlflow.note.content", verdict.sentence)
        self.console.print()
        print_verdict(verdict, self.console)
        return verdict

    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()


def _summary(stage: Finished) -> str:
    result = stage.result
    how = "reused, as nothing has changed" if stage.reused else f"{result.train_seconds:.1f} s of training"
    return f"{100 * result.val_accuracy:.1f} % of the validation images right ({how})"


def _one_sample(data: LightningDataModule) -> Tensor:
    batch = Classification().read(next(iter(data.val_dataloader())))
    return batch.args[0][:1]  # type: ignore[no-any-return]


def _speed(latency: Latency) -> dict[str, float | None]:
    return {
        "final/latency_ms_p50": latency.p50_ms,
        "final/latency_ms_p95": latency.p95_ms,
        "final/throughput_per_s": latency.throughput_per_s,
    }
