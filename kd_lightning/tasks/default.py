"""The task that is meant where none is given."""

from collections.abc import Iterable, Iterator

from torch import nn

from kd_lightning.tasks.base import Task
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.language_modelling import LanguageModelling, is_causal, is_encoder_decoder
from kd_lightning.tasks.regression import Regression
from kd_lightning.tasks.token_classification import TokenClassification


def or_default(task: Task | None, network: nn.Module | None, losses: Iterable[nn.Module] = ()) -> Task:
    """Return a task that was given; else the one that a network of ``transformers``, or losses, are for.

    A causal language model shifts labels inside itself: :class:`LanguageModelling` shifts them likewise. Labels of a
    masked one, and those of a decoder with an encoder, stand where its logits do.

    Args:
        task: None where none is given.
        network: The student, or a module that holds it and nothing else that has weights; None where it is not known.
        losses: Values are meant where one is of values, such as ``TeacherRegression``, and none over classes.
    """
    if task is not None:
        return task
    of_network = None if network is None else _of_network(network)
    if of_network is not None:
        return of_network
    losses = list(losses)
    values = any(getattr(x, "of_values", False) for x in losses)
    return Regression() if values and not any(getattr(x, "over_classes", False) for x in losses) else Classification()


def _of_network(network: nn.Module) -> Task | None:
    if is_causal(network):
        return LanguageModelling()
    kinds = set(_kinds(network))
    if any(kind.endswith("ForMaskedLM") for kind in kinds) or is_encoder_decoder(network):
        return LanguageModelling(shift=False)
    if any(kind.endswith("ForTokenClassification") for kind in kinds):
        return TokenClassification(class_dim=2)
    if any(kind.endswith("ForQuestionAnswering") for kind in kinds):
        return Classification(class_dim=2, units="ends of answers")  # (B, 2, S): a softmax over the places of each end
    return None


def _kinds(network: nn.Module) -> Iterator[str]:
    """Name the classes of the outermost model of ``transformers`` in a network: ``BertForMaskedLM`` ..."""
    for module in network.modules():
        names = [kind.__name__ for kind in type(module).__mro__]
        if "PreTrainedModel" in names:
            yield from names
            return
