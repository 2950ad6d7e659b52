"""Forward KL from the last hidden states; see :mod:`kd_lightning.losses.fused_linear`."""

import torch
from torch import Tensor

from kd_lightning.losses.base import check_temperature, padding
from kd_lightning.losses.fused_linear import _check_learns_nothing
from kd_lightning.losses.fused_linear_divergence import _of_two_heads
from kd_lightning.losses.fused_linear_top_k_kl import fused_linear_top_k_kl
from kd_lightning.losses.fused_loss import FusedLoss
from kd_lightning.losses.token_divergence import log_softmax
from kd_lightning.outputs import Outputs, TopK


def fused_linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """T²·KL(p_t ‖ p_s) with p = softmax((h Wᵀ + b) / T), averaged over the tokens that count.

    The same as :func:`~kd_lightning.losses.forward_kl` of both models' logits, which at no time exist for more than
    ``chunk_size`` tokens. For the arguments, other divergences, and what is in which precision see
    :func:`~kd_lightning.losses.fused_linear_divergence`.

    Raises:
        ValueError: For a temperature ≤ 0 or one that is learnt, a chunk_size < 1, a memory ≤ 0, or shapes that do not
            belong together.

    Example:
        In a LightningModule, around causal language models as of Hugging Face: ``model`` gives the hidden states,
        ``lm_head`` is not called. (There ``model(ids)`` has them as ``.last_hidden_state``.)

        >>> import lightning.pytorch as pl
        >>> from torch import nn
        >>> from kd_lightning.losses import fused_linear_top_k_kl
        >>> class Tiny(nn.Module):
        ...     def __init__(self, vocabulary: int, width: int) -> None:
        ...         super().__init__()
        ...         self.model = nn.Embedding(vocabulary, width)
        ...         self.lm_head = nn.Linear(width, vocabulary, bias=False)
        >>> class Distilled(pl.LightningModule):
        ...     def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        ...         super().__init__()
        ...         self.student = student
        ...         self.teacher = [teacher.eval()]  # in a list: in no checkpoint and no optimizer
        ...
        ...     def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ...         student, teacher, ids, labels = self.student, self.teacher[0], batch["input_ids"], batch["labels"]
        ...         with torch.no_grad():
        ...             theirs = teacher.model(ids)[:, :-1]
        ...         ours, next_tokens = student.model(ids)[:, :-1], labels[:, 1:]
        ...         kd = fused_linear_kl(
        ...             ours, student.lm_head.weight, theirs, teacher.lm_head.weight, next_tokens, temperature=2.0
        ...         )
        ...         label = next_tokens[..., None]  # one best class, of probability 1: cross-entropy
        ...         hard = fused_linear_top_k_kl(
        ...             ours, student.lm_head.weight, label, torch.zeros(label.shape), next_tokens
        ...         )
        ...         return 0.9 * kd + 0.1 * hard
        ...
        ...     def configure_optimizers(self) -> torch.optim.Optimizer:
        ...         return torch.optim.AdamW(self.parameters(), lr=1e-3)
        >>> ids = torch.randint(50, (2, 7))
        >>> module = Distilled(Tiny(50, 3), Tiny(50, 8))
        >>> module.training_step({"input_ids": ids, "labels": ids}, 0).backward()
        >>> module.student.lm_head.weight.grad.shape
        torch.Size([50, 3])
    """
    check_temperature(temperature)
    _check_learns_nothing("temperature", temperature)

    def slope(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor | None]:
        # By hand: two thirds of the time that autograd takes for it.
        log_s, log_t = log_softmax(logits, temperature), log_softmax(teacher_logits, temperature)
        p_t = log_t.exp()
        total = temperature**2 * log_t.sub_(log_s).mul_(p_t).sum()
        return total, log_s.exp_().sub_(p_t).mul_(temperature) if torch.is_grad_enabled() else None

    student, teacher = (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias)
    return _of_two_heads(slope, student, teacher, target, chunk_size, memory, ignore_index)


class FusedKL(FusedLoss):
    """Forward KL without logits of all tokens: :class:`~kd_lightning.losses.ForwardKL` for large vocabularies.

    Where only the teacher's k best tokens are known (:class:`~kd_lightning.outputs.TopK`), it is
    :func:`~kd_lightning.losses.fused_linear_top_k_kl` with a tail, and the teacher needs no layer and no head.

    Args:
        student_layer: Name of the layer whose output the student's head takes, see
            :class:`~kd_lightning.losses.fused_loss.FusedLoss`.
        student_head: Name of the student's head.
        teacher_layer: Name of the layer whose output the teacher's head takes; None for a teacher's best tokens.
        teacher_head: Name of the teacher's head; likewise.
        temperature: T > 0, of both sides and of the factor T².
        weight: Factor of the term.
        memory: MB for the logits of both sides that are held at a time; 64 on a CPU, 512 elsewhere unless given.

    Raises:
        ValueError: For numbers out of their ranges.

    Example:
        >>> from kd_lightning.losses import FusedHardLabel
        >>> objective = {
        ...     "hard_label": FusedHardLabel("norm", "head", weight=0.1),
        ...     "kl": FusedKL("norm", "head", "norm", "head", weight=0.9),
        ... }
    """

    takes_top_k = True

    def __init__(
        self,
        student_layer: str,
        student_head: str,
        teacher_layer: str | None = None,
        teacher_head: str | None = None,
        temperature: float = 1.0,
        weight: float = 1.0,
        memory: float | None = None,
    ) -> None:
        super().__init__(student_layer, student_head, teacher_layer, teacher_head, weight, memory)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs | TopK, target: Tensor | None) -> Tensor:
        hidden, head, bias = self.student_side(student)
        tokens = padding(hidden, target)
        if isinstance(teacher, TopK):
            best = teacher.indices, teacher.log_probs
            return fused_linear_top_k_kl(
                hidden, head, *best, tokens, temperature=self.temperature, memory=self.memory, student_bias=bias
            )
        of_teacher, teacher_head, teacher_bias = self.teacher_side(teacher)
        return fused_linear_kl(
            hidden,
            head,
            of_teacher,
            teacher_head,
            tokens,
            temperature=self.temperature,
            memory=self.memory,
            student_bias=bias,
            teacher_bias=teacher_bias,
        )
