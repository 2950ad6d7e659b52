"""What a batch means, and what a good answer is: one file a task."""

from kd_lightning.tasks.base import Task
from kd_lightning.tasks.batch import Batch, Identified, Taught, unwrapped
from kd_lightning.tasks.classification import Classification, or_classification
from kd_lightning.tasks.headline import Headline
from kd_lightning.tasks.metric import HeadlineMetric

__all__ = [
    "Batch",
    "Classification",
    "Headline",
    "HeadlineMetric",
    "Identified",
    "Task",
    "Taught",
    "or_classification",
    "unwrapped",
]
