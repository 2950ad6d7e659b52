"""All stages, one after the other, under one parent run."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from kd_lightning.answers import Answer, Question, existing, is_known, keep, named_paths
from kd_lightning.data.contract import Data, make_data
from kd_lightning.durable_files import remove_leftovers
from kd_lightning.export.batches import part
from kd_lightning.pipeline.compare import against_teacher, compare
from kd_lightning.pipeline.folder import FinishedStage, held_if_free
from kd_lightning.pipeline.logged import best_model, figures_of, figures_of_serving, file_model, network_model
from kd_lightning.pipeline.measure import NAMES, measure, measure_files, measure_writing
from kd_lightning.pipeline.preflight import check_trainings
from kd_lightning.pipeline.quantize import QuantizationPlan, float_file
from kd_lightning.pipeline.report_record import write_record
from kd_lightning.pipeline.run import run_stage, store_teachers_outputs, with_members
from kd_lightning.pipeline.training import Training
from kd_lightning.processor import describe
from kd_lightning.records import Verdict
from kd_lightning.report.facts import RECORD
from kd_lightning.report.html import write_report
from kd_lightning.report.markdown import as_markdown, sweep_as_markdown
from kd_lightning.report.stage_progress import StageProgress
from kd_lightning.report.table import temperature
from kd_lightning.report.terminal import print_places, print_verdict, tables_of
from kd_lightning.report.verdict_json import VERDICT, write_verdict
from kd_lightning.report.words import say
from kd_lightning.source_code import files_read
from kd_lightning.tasks import Batch, Task
from kd_lightning.tasks.base import in_a_row
from kd_lightning.tracking.journal import now
from kd_lightning.tracking.logger import check_writable
from kd_lightning.tracking.runs import MakeLogger, Tracking, is_rank_zero
from kd_lightning.tracking.sweeps import Sweep
from kd_lightning.tracking.view import look

RAISE_ERRORS_OF_REPORT = "KD_RAISE_ERRORS_OF_REPORT"
"""Variable of the environment with which a report that cannot be written is an error, as in tests; 1 for yes."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Pipeline:
    """Trains the teacher and then each student, quantises them, and says whether distillation is worth it.

    Attributes:
        name: The parent run's name.
        task: What a batch means and what a good answer is, for all trainings.
        teacher: Its training; None where no stage needs one.
        students: Trainings in the order in which they run.
        config: The whole configuration, for the parent run.
        work_dir: The folder where stages keep their checkpoints and results.
        members: Further teachers of an ensemble; neither rows of the comparison, nor quantised.
        assistants: Networks between teacher and student, each taught by an earlier one, in the order in which they run.
        to_store: Trainings for whose samples the teacher's outputs are stored, once it is trained.
        quantized: How they are quantised; None for nothing. With it, files are timed in ONNX Runtime in place of
            networks in PyTorch.
        make_logger: Makes a run's logger; None to keep its journal alone.
        console: Where progress and verdict are printed.
        verdict: Whether to compare at the end.
        reference: Label of the distilled model with which the others are compared; None for no such table.
        register: Name under which the model that the verdict would serve is registered; None for nothing.
        sweep: Of which it is a job.
        asked: What the command asked, by which the same command finds what this one found; None for no such answer.

    Raises:
        ValueError: For a training whose teacher is not there, and a reference that is no distilled model.
    """

    name: str
    task: Task
    teacher: Training | None
    students: Sequence[Training]
    config: Mapping[str, Any]
    work_dir: Path
    members: Sequence[Training] = ()
    assistants: Sequence[Training] = ()
    to_store: Sequence[Training] = ()
    quantized: QuantizationPlan | None = None
    make_logger: MakeLogger | None = None
    console: Console = field(default_factory=Console)
    verdict: bool = True
    reference: str | None = None
    register: str | None = None
    sweep: Sweep | None = None
    asked: Question | None = None

    def __post_init__(self) -> None:
        known = [training.label for training in (self.teacher, *self.members) if training is not None]
        for training in (*self.assistants, *self.students):
            if training.needs_teacher and training.taught_by == "teacher" and self.teacher is None:
                with training.errors("stages"):
                    raise ValueError(
                        f"{training.name} needs a teacher: add teacher to the stages, or pass teacher.checkpoint=<its "
                        "weights>"
                    )
            if training.needs_teacher and training.taught_by not in known:
                with training.errors("taught_by"):
                    raise ValueError(f"{training.name} is taught by {training.taught_by!r}, expected one of {known}")
            if training.role == "assistant":
                known.append(training.label)
            if training.is_judged_by_teacher and self.teacher is None:
                with training.errors("stages"):
                    raise ValueError(
                        f"{type(self.task).__name__} judges models by their agreement with the teacher, which is not "
                        "there: add teacher to the stages, or pass teacher.checkpoint=<its weights>"
                    )
        distilled = list(dict.fromkeys(training.label for training in self.students if training.role == "distilled"))
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
        console = self.console if is_rank_zero() else Console(quiet=True)
        trainings = self._trainings()
        with console.status(f"checking the data, the networks and the losses of {len(trainings)} trainings"):
            check_trainings(trainings, self.quantized)
        for training in trainings:
            training.code()  # is read now, ahead of edits during the training: what was imported is what runs
        folder = self.work_dir / f"pipeline-{self._fingerprint()[:12]}"
        # Where another process runs the very same pipeline, this one has a parent run of its own.
        with held_if_free(folder) if is_rank_zero() else nullcontext(False) as alone:
            own = folder if alone else folder.with_name(f"{folder.name}-{uuid4().hex[:8]}")
            tracking = Tracking(self.make_logger, self.name, self.config, own, self.sweep)
            size = "size_mb" if self.quantized is None else "file_mb"
            shown = [f"final/{name}" for name in ("agreement", "retention", size, "latency_ms_p50")]
            tracking.share_views(self.task.headline.key, shown, not self.task.headline.higher_is_better)
            try:
                finished, stages = self._run_stages(tracking)
                if not is_rank_zero():
                    return None
                verdict, page = self._compare(finished, tracking, folder / VERDICT) if self.verdict else (None, None)
                tracking.describe_sweep(partial(sweep_as_markdown, self.task.headline))
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
                tracking.close("KILLED" if interrupted else "FAILED")
                raise
            tracking.close("FINISHED")
            places = tracking.places()
            print_places(page, places, self.console)
            if self.asked is not None and verdict is not None and page is not None and alone:
                try:
                    self._keep_answer(self.asked, verdict, page, places, tracking, folder, stages)
                except Exception as error:
                    _log.warning("the answer is not kept, %s: %s; all else is there", type(error).__name__, error)
            return verdict

    def _keep_answer(
        self,
        asked: Question,
        verdict: Verdict,
        page: Path,
        places: Sequence[str],
        tracking: Tracking,
        folder: Path,
        stages: Sequence[Path],
    ) -> None:
        """Keep what was found for the same command, where it can be known whether anything has changed."""
        stored, inputs = tracking.stored(), list[str]()
        for training in self._trainings():
            found = training.make_data().sources()
            if found is None or not is_known(training.config):
                return
            inputs += [*existing(found), *named_paths(training.config, self.work_dir)]
        if stored is None:
            return
        answer = Answer(
            tables=tables_of(verdict),
            words=say(verdict),
            objective=verdict.objective,
            verdict=str(folder / VERDICT),
            report=str(page),
            places=tuple(places),
            store=stored.store,
            experiment=stored.experiment,
            runs=stored.runs,
        )
        keep(folder, asked, answer, files_read(), inputs, stages)

    def _trainings(self) -> list[Training]:
        return [training for training in (self.teacher, *self.members, *self.assistants, *self.students) if training]

    def _run_stages(self, tracking: Tracking) -> tuple[list[FinishedStage], list[Path]]:
        """Return the rows of the comparison, and the folders of all that they follow from."""
        trainings = self._trainings()
        rows = [training for training in trainings if training.label not in {member.label for member in self.members}]
        finished: list[FinishedStage] = []
        by_label: dict[str, FinishedStage] = {}
        stored: set[Path] = set()
        console = self.console if is_rank_zero() else Console(quiet=True)
        count = len(trainings) + (self.quantized.count(rows) if self.quantized is not None else 0)
        with StageProgress(console, count) as progress:

            def run(training: Training) -> FinishedStage:
                progress.begin(training.name)
                stage = self._run_one(training, by_label, tracking, progress)
                progress.end(training.name, _summary(stage))
                return stage

            for training in trainings:
                by_label[training.label] = stage = run(training)
                if training in rows:
                    finished.append(stage)
                for waiting in self.to_store:
                    if waiting.taught_by == training.label:
                        store_teachers_outputs(waiting, stage, self.work_dir, stored)
            if self.quantized is not None:
                finished += self.quantized.run(finished, run)
        folders = [stage.folder.path for stage in (*by_label.values(), *finished)]
        return finished, [*folders, *stored]

    def _run_one(
        self, training: Training, finished: Mapping[str, FinishedStage], tracking: Tracking, progress: StageProgress
    ) -> FinishedStage:
        tags: dict[str, Any] = {"kd.role": training.role, "kd.method": training.method, "kd.seed": training.seed}
        tags |= look(training.role, len(tracking.runs))
        training = with_members(training, finished)
        stage = run_stage(
            training,
            finished.get(training.taught_by or ""),
            self.work_dir,
            lambda folder: tracking.logger(training.name, tags, training.config, folder),
            [progress],
            judge=finished.get("teacher"),
        )
        if stage.reused:
            tracking.reused(training.name, tags, training.config, stage.folder.path)
        run_id = tracking.runs.get(training.name)
        inputs = stage.inputs() if run_id is not None else []
        for described in inputs:
            tracking.log(run_id, "dataset", **described)
        if stage.result.temperature is not None:
            tracking.tag(run_id, "kd.temperature", temperature(stage.result.temperature))
        values = stage.result.metrics(self.task.headline)
        teacher = stage if training.role == "teacher" else finished.get("teacher")
        if teacher is not None:
            against = against_teacher(stage.result, teacher.result, self.task)
            values |= {f"final/{name}": value for name, value in against.items()}
        # Variants may share a name.
        stage = replace(stage, run_id=run_id, metrics=values, logged_at=now(), inputs=lambda: inputs)
        tracking.metrics(run_id, values, stage.logged_at)
        if run_id is not None:
            network = network_model(stage)
            for model in (network, file_model(stage)):
                if model is not None:
                    tracking.log(run_id, "model", **model)
                    tracking.log(run_id, "figures", **figures_of(model, stage, values, stage.logged_at))
            if network is None and not stage.reused:
                tracking.artifact(run_id, stage.folder.weights)
        tracking.text(run_id, json.dumps(training.config, indent=2, default=str), "config.json")
        tracking.finish(run_id)
        return stage

    def _compare(self, finished: list[FinishedStage], tracking: Tracking, path: Path) -> tuple[Verdict, Path | None]:
        data = make_data(finished[0].training.data, role="distilled", seed=0)
        data.setup("validate")
        data.setup("test")
        for name, value in data.described.items():
            if isinstance(value, str):
                tracking.tag(tracking.run_id, f"data/{name}", value)
            else:
                tracking.metrics(tracking.run_id, {f"data/{name}": value})
        tracking.settle()
        with self.console.status("timing the models"):
            costs = self._measure(finished, data)
        parts = self._parts(data)
        results = []
        for stage in finished:
            of_parts = {name: self.task.headline.value(stage.result.scores[units]) for name, units in parts.items()}
            cost = {key: x for key, x in costs[stage.result.label].items() if key not in stage.result.figures}
            results.append(replace(stage.result, figures={**stage.result.figures, **cost}, parts=of_parts))
            named = {f"final/{key}": value for key, value in cost.items()}
            self._log_cost(stage, named, stage is _first_seeds(finished)[stage.result.label], tracking)
        verdict = compare(
            results,
            self.task,
            reference=self.reference,
            extra=data.unlabelled,
            runtime=NAMES["onnxruntime"] if self.quantized is not None else "PyTorch",
            processor=describe(),
        )
        write_verdict(verdict, path)
        tracking.metrics(tracking.run_id, verdict.metrics())
        best = best_model(verdict, finished) if self.register else None
        if best is not None:
            tracking.log(tracking.run_id, "register", name=self.register, digest=best["digest"])
        tracking.artifact(tracking.run_id, path)
        tracking.tag(tracking.run_id, "mlflow.note.content", as_markdown(verdict))
        self.console.print()
        print_verdict(verdict, self.console)
        return verdict, self._report(path.with_name(RECORD), verdict, finished, data, tracking)

    def _log_cost(self, stage: FinishedStage, values: Mapping[str, float], timed: bool, tracking: Tracking) -> None:
        """Log what it costs to serve a stage's model.

        Args:
            stage: Any of the model's seeds.
            values: By name.
            timed: Whether it is the seed that was timed.
            tracking: Where the stage has its run.
        """
        at = now()
        tracking.metrics(stage.run_id, values, at)
        file = file_model(stage) if stage.result.quantized is None else None
        if file is not None:  # it was written to be timed
            tracking.log(stage.run_id, "model", **file)
            tracking.log(stage.run_id, "figures", **figures_of(file, stage, stage.metrics, stage.logged_at))
        for figures in figures_of_serving(stage, values, at, of_file=self.quantized is not None) if timed else ():
            tracking.log(stage.run_id, "figures", **figures)

    def _report(
        self, path: Path, verdict: Verdict, finished: Sequence[FinishedStage], data: Data, tracking: Tracking
    ) -> Path | None:
        """Write the report and return it; its failure fails no pipeline, whose verdict is there."""
        try:
            write_record(
                path,
                name=self.name,
                task=self.task,
                verdict=verdict,
                finished=finished,
                data=data,
                config=self.config,
            )
            page = write_report(path.parent)
        except Exception as error:
            if os.environ.get(RAISE_ERRORS_OF_REPORT) == "1":
                raise
            _log.warning("no report was written, %s: %s; the verdict stands", type(error).__name__, error)
            return None
        tracking.artifact(tracking.run_id, path)
        tracking.artifact(tracking.run_id, page)
        return page

    def _measure(self, finished: Sequence[FinishedStage], data: Data) -> dict[str, dict[str, float]]:
        """Time one network of each model, or its file; return the figures by label."""
        first = _first_seeds(finished)
        example = part(self.task.read(next(iter(data.val_dataloader()))), slice(1))
        writing = {label: stage.network() for label, stage in first.items() if stage.result.quantized is None}
        written = measure_writing(writing) if self.task.writes else {}
        served = self._measure_served(first, data, example)
        return {label: {**figures, **written.get(label, {})} for label, figures in served.items()}

    def _measure_served(
        self, first: Mapping[str, FinishedStage], data: Data, example: Batch
    ) -> dict[str, dict[str, float]]:
        if self.quantized is None:
            return measure({label: stage.network() for label, stage in first.items()}, example)
        files = {
            label: stage.folder.file if stage.result.quantized is not None else float_file(stage, data)
            for label, stage in first.items()
        }
        return measure_files(files, example)

    def _parts(self, data: Data) -> dict[str, NDArray[np.bool_]]:
        """Return the parts of the test units that the task compares on their own."""
        if not (self.task.labelled and self.task.has_parts):
            return {}
        targets = [self.task.read(batch).target for batch in data.test_dataloader()]
        return self.task.parts(in_a_row([target for target in targets if target is not None]), data.class_names)

    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode()).hexdigest()


def _first_seeds(finished: Sequence[FinishedStage]) -> dict[str, FinishedStage]:
    """Return the first seed of each model, by its label: the one that is timed."""
    first = {stage.result.label: stage for stage in reversed(finished)}
    return dict(reversed(first.items()))


def _summary(stage: FinishedStage) -> str:
    result, headline = stage.result, stage.training.task.headline
    how = "reused, as nothing has changed" if stage.reused else f"{result.figures['train_seconds']:.1f} s of training"
    return f"validation {headline.name} {headline.write(result.figures['val'])} ({how})"
