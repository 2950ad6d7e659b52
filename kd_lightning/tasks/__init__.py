"""What a batch means, and what a good answer is: one file a task."""

from kd_lightning.headline import Headline
from kd_lightning.tasks.base import Task
from kd_lightning.tasks.batch import Batch, Identified, Taught, unwrapped
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.default import or_default
from kd_lightning.tasks.embedding import Embedding
from kd_lightning.tasks.language_modelling import LanguageModelling, is_causal
from kd_lightning.tasks.metric import HeadlineMetric
from kd_lightning.tasks.multilabel import MultiLabel
from kd_lightning.tasks.regression import Regression
from kd_lightning.tasks.segmentation import Segmentation
from kd_lightning.tasks.token_classification import TokenClassification

__all__ = [
    "Batch",
    "Classification",
    "Embedding",
    "Headline",
    "HeadlineMetric",
    "Identified",
    "LanguageModelling",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Task",
    "Taught",
    "TokenClassification",
    "is_causal",
    "or_default",
    "unwrapped",
]
