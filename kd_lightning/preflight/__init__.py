"""What can be known to be wrong before the first training step; both front doors and the pipeline ask here."""

from kd_lightning.preflight.batches import check_source, converts_inputs, first_batch, need_labels
from kd_lightning.preflight.dry_run import compute_once, dry_run, samples_needed
from kd_lightning.preflight.heads import check_heads, check_inputs, check_runs_without_logits
from kd_lightning.preflight.labels import check_class_names, warn_of_missing_classes
from kd_lightning.preflight.networks import (
    check_checkpoint,
    check_factories,
    check_networks,
    check_optimizer,
    check_parts,
    check_task,
    check_trainable,
)
from kd_lightning.preflight.next_tokens import check_next_tokens
from kd_lightning.preflight.outputs import check_all_logits, check_logits, check_outputs, check_top_k, classes_of
from kd_lightning.preflight.teacher_score import check_teacher_score

__all__ = [
    "check_all_logits",
    "check_checkpoint",
    "check_class_names",
    "check_factories",
    "check_heads",
    "check_inputs",
    "check_logits",
    "check_networks",
    "check_next_tokens",
    "check_optimizer",
    "check_outputs",
    "check_parts",
    "check_runs_without_logits",
    "check_source",
    "check_task",
    "check_teacher_score",
    "check_top_k",
    "check_trainable",
    "classes_of",
    "compute_once",
    "converts_inputs",
    "dry_run",
    "first_batch",
    "need_labels",
    "samples_needed",
    "warn_of_missing_classes",
]
