"""A teacher whose outputs were written to disk."""

from collections.abc import Iterable

from kd_lightning.outputs import Outputs
from kd_lightning.tasks.batch import Batch
from kd_lightning.teachers.base import TeacherSource


class Stored(TeacherSource):
    """Outputs that come with each training batch, from :class:`~kd_lightning.stored_outputs.StoredOutputs`.

    There are none for validation batches, unless their data set is wrapped as well: agreement and the teacher's
    accuracy are then not logged.

    Raises:
        ValueError: Before the training, for batches without outputs and layers that were not stored.

    Example::

        store_outputs(network, dataset, "outputs", views=10)
        stored = StoredOutputs(dataset, "outputs")
        module = DistillationModule(student, Stored(), losses, optimizer)
        trainer.fit(module, DataLoader(stored, batch_size=64, sampler=Views(stored)))
    """

    def __call__(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        if batch.teacher is None:
            raise ValueError(
                "expected batches that bring the teacher's stored outputs along, got one without: wrap the training "
                "set, StoredOutputs(dataset, path)"
            )
        features = batch.teacher.features
        missing = [name for name in layers if name not in features]
        if missing:
            raise ValueError(
                f"the teacher's layers {missing} were not stored, got {list(features) or 'none'}: call store_outputs "
                "with layers=, into another folder"
            )
        # Half precision is how they are stored, not how precise they are meant to be.
        outputs = batch.teacher._replace(features={name: features[name].float() for name in layers})
        return outputs._replace(logits=outputs.logits.float())

    def dry(self, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        return self(batch, layers)

    def can_teach(self, batch: Batch) -> bool:
        return batch.teacher is not None
