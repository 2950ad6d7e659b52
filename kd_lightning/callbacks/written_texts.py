"""Texts that the student or the teacher writes, in the place of those of the data set."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from kd_lightning.callbacks.hyperparameter_schedule import value_at
from kd_lightning.draws import hashed_uniform
from kd_lightning.module import DistillationModule
from kd_lightning.progress import check_length_is_known, progress
from kd_lightning.schedules import Schedule
from kd_lightning.tasks import Batch
from kd_lightning.tasks.batch import IGNORE_INDEX
from kd_lightning.teachers import Teacher
from kd_lightning.tracking.metrics import logs_this_step
from kd_lightning.writing import write


class _Writing(Callback):
    """Lets somebody write the end of each text of a batch; a subclass says who, and of which batches."""

    def __init__(self, prompt: float, temperature: float) -> None:
        if not 0 < prompt < 1:
            raise ValueError(f"expected prompt between 0 and 1, the share of a text that is kept, got {prompt}")
        if not temperature > 0:
            raise ValueError(f"expected temperature > 0, got {temperature}: 1 draws tokens as the model has them")
        self.prompt, self.temperature = prompt, temperature

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check(pl_module)
            assert isinstance(pl_module, DistillationModule)
            pl_module.rewrites.append(self._rewrite)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, DistillationModule) and self._rewrite in pl_module.rewrites:
            pl_module.rewrites.remove(self._rewrite)

    def check(self, pl_module: LightningModule) -> None:
        """Raise ValueError for a module in which nothing can be written."""
        if not isinstance(pl_module, DistillationModule):
            raise ValueError(
                f"{type(self).__name__} changes the batch that the networks get, which {type(pl_module).__name__} "
                "reads itself: take a DistillationModule"
            )

    def _rewrite(self, module: DistillationModule, batch: Batch) -> Batch:
        raise NotImplementedError

    def _replaced(self, batch: Batch, texts: Tensor) -> Batch:
        """Put texts (B, S + 1) in the place of a batch's: tokens, and for each the next one."""
        _, target = _texts_of(batch)
        target = texts[:, 1:].masked_fill(target == IGNORE_INDEX, IGNORE_INDEX)
        if batch.args:
            return batch._replace(args=(texts[:, :-1], *batch.args[1:]), target=target)
        return batch._replace(kwargs={**batch.kwargs, "input_ids": texts[:, :-1]}, target=target)

    def _kept(self, tokens: Tensor) -> int:
        return min(max(1, round(self.prompt * tokens.shape[1])), tokens.shape[1] - 1)


class OnPolicy(_Writing):
    """Let the student write texts, and the teacher say what it would have written at each place.

    Generalized knowledge distillation (Agarwal et al., ICLR 2024, https://arxiv.org/abs/2306.13649, algorithm 1): with
    probability λ, a batch's texts are cut to prompts which the student writes on, so that it learns where its own
    mistakes lead; else they are the data set's. No gradient goes through the writing. Divergences of any direction go
    with it: ``reverse_kl``, ``jensen_shannon``. The prompt's places count, too. Tokens are drawn from torch's global
    generator, which a checkpoint holds, so that a resumed training writes the same texts.

    Args:
        share: λ from 0 to 1, or a schedule of it over the training's progress (``kd_lightning.schedules``).
        prompt: Share of a text that is kept.
        temperature: At which the student writes.

    Raises:
        ValueError: At the start of ``fit``, for a teacher that does not run beside the student, losses that read labels
            (a text of the student's has none), and a share beyond 0 to 1.
    """

    def __init__(self, share: float | Schedule = 0.5, prompt: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__(prompt, temperature)
        self.share = share
        if not callable(share):
            _check_share(share)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if callable(self.share):
            check_length_is_known(trainer)

    def check(self, pl_module: LightningModule) -> None:
        super().check(pl_module)
        assert isinstance(pl_module, DistillationModule)
        _network_of(pl_module, "scores what the student writes")
        reading = [name for name, loss in pl_module.objective.named_losses().items() if loss.needs_labels]
        if reading:
            raise ValueError(
                f"losses {reading} read labels, which a text that the student has written does not have, expected "
                "losses that compare with the teacher: leave them out"
            )
        for step in range(1001) if callable(self.share) else ():
            _check_share(self._share(step / 1000))

    def _share(self, done: float) -> float:
        return value_at(done, "OnPolicy.share", self.share, not_negative=True) if callable(self.share) else self.share

    def _rewrite(self, module: DistillationModule, batch: Batch) -> Batch:
        share = self._share(progress(module.trainer))
        if logs_this_step(module.trainer):
            module.log("kd/on_policy_share", share)
        if float(torch.rand(())) >= share:
            return batch
        tokens, _ = _texts_of(batch)
        kept = self._kept(tokens)
        uniform = torch.rand(len(tokens), tokens.shape[1] + 1 - kept).to(tokens.device)
        return self._replaced(batch, write(module.student, tokens[:, :kept], uniform, self.temperature))


class SequenceLevel(_Writing):
    """Let the teacher write the end of each text, once, and the student learn the text as if it were the data set's.

    Sequence-level distillation (Kim & Rush, EMNLP 2016, https://arxiv.org/abs/1606.07947, section 3.2): hard labels,
    but whole texts of the teacher's. The authors take the most likely text, by beam search; a text that is drawn keeps
    the variety that a language model needs. Take ``losses=[hard_label]``. Each text is written in the first epoch and
    kept in memory, two bytes a token or four; what is drawn is a function of (seed, sample, place), so that a resumed
    training writes the same texts.

    Args:
        prompt: Share of a text that is kept.
        temperature: At which the teacher writes.
        seed: Of the draw.

    Raises:
        ValueError: At the start of ``fit``, for a teacher that does not run beside the student.
    """

    needs_sample_ids = True

    def __init__(self, prompt: float = 0.5, temperature: float = 1.0, seed: int = 0) -> None:
        super().__init__(prompt, temperature)
        self.seed = seed
        self._texts: Tensor | None = None
        self._written: Tensor | None = None

    def check(self, pl_module: LightningModule) -> None:
        super().check(pl_module)
        assert isinstance(pl_module, DistillationModule)
        _network_of(pl_module, "writes the texts")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._texts = self._written = None  # of another teacher, or another data set

    def _rewrite(self, module: DistillationModule, batch: Batch) -> Batch:
        tokens, _ = _texts_of(batch)
        if batch.samples is None:
            raise ValueError(
                "SequenceLevel keeps the text of each sample, and the batch does not say which samples it holds: put "
                "kd_lightning.data.WithIds around the training set"
            )
        ids, kept = batch.samples.ids.cpu(), self._kept(tokens)
        if self._texts is None or self._written is None:
            self._texts = torch.zeros(batch.samples.total, tokens.shape[1] + 1 - kept, dtype=torch.int32)
            self._written = torch.zeros(batch.samples.total, dtype=torch.bool)
        new = ~self._written[ids]
        if new.any():
            prompts = tokens[new.to(tokens.device), :kept]
            uniform = hashed_uniform(self.seed, ids[new], self._texts.shape[1]).to(tokens.device)
            network = _network_of(module, "writes the texts")
            written = write(network, prompts, uniform, self.temperature)[:, kept:]
            self._texts[ids[new]], self._written[ids[new]] = written.cpu().int(), True
        ends = self._texts[ids].to(tokens)
        return self._replaced(batch, torch.cat([tokens[:, :kept], ends], 1))


def _texts_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return tokens and target, (B, S) each."""
    tokens, target = next(iter(batch.args), batch.kwargs.get("input_ids")), batch.target
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or target is None or target.shape != tokens.shape:
        raise ValueError(
            "expected a batch of tokens (B, S) with the next token of each as target, got "
            f"{'no tokens' if not isinstance(tokens, Tensor) else tuple(tokens.shape)} and "
            f"{'no target' if target is None else tuple(target.shape)}: pass task=LanguageModelling()"
        )
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask[:, 0].all()):
        raise ValueError("expected texts that begin at the first place, got padding there: pad them at their ends")
    return tokens, target


def _network_of(module: DistillationModule, does: str) -> nn.Module:
    if not isinstance(module.teacher, Teacher):
        kind = "none" if module.teacher is None else type(module.teacher).__name__
        raise ValueError(
            f"expected a teacher that runs beside the student, as it {does}, got {kind}: take teachers=live"
        )
    return module.teacher.network


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"expected share from 0 to 1, the probability that the student writes a batch, got {share}")
