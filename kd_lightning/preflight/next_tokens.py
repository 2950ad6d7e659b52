"""Whether labels stand where a causal language model of ``transformers`` is judged."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kd_lightning.tasks import Task, is_causal
from kd_lightning.tasks.language_modelling import place_of_labels


def check_next_tokens(
    student: nn.Module, task: Task, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any
) -> None:
    """Raise ValueError for labels at their own tokens' places beside a causal model, which shifts them inside itself.

    Args:
        student: That is called.
        task: That has read the target.
        args: Of the student.
        kwargs: Likewise.
        target: As losses read it.
    """
    tokens = kwargs.get("input_ids", next(iter(args), None))
    if not (isinstance(tokens, Tensor) and isinstance(target, Tensor) and is_causal(student)):
        return
    if not tokens.is_floating_point() and place_of_labels(tokens.cpu(), target.cpu()) == 0:
        raise ValueError(
            f"the labels stand at their own tokens' places, where {type(student).__name__}, a causal language model, "
            f"says what comes next, and {type(task).__name__} does not shift them: expected the next token of each; "
            "leave task= out or pass task=LanguageModelling(), which shifts the labels of a mapping, and "
            "task=LanguageModelling(shift=True) those of a tuple"
        )
