"""Contrastive Representation Distillation (Tian et al., ICLR 2020), https://arxiv.org/abs/1910.10699."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import FeatureLoss
from kd_lightning.losses.features import embedding, project
from kd_lightning.losses.gather import all_gather
from kd_lightning.outputs import Outputs, Samples


def crd(
    positive: Tensor, negatives: Tensor, allowed: Tensor, *, count: int, total: int, log_z: Tensor | float
) -> Tensor:
    """−log h(positive) − Σ_K log(1 − h(negative)), h = p / (p + K/N), p = e^score / Z; averaged over samples.

    Noise-contrastive estimation: h is the probability that a score is the positive's and not one of K drawn from N.
    The sum is K times the mean over the negatives that are allowed, its expectation whichever of them were drawn; zero
    for a sample without any. The authors add 1e-7 to the denominators; this is the limit without, in log-sum-exp form.

    Shape:
        positive: (B,), scores of the positives: inner products over τ. negatives: (B, D), scores of any D samples.
        allowed: bool (B, D), which of those are a sample's negatives.
        count: K; total: N; log_z: log Z, a scalar.
    """
    offset = log_z + math.log(count / total)
    drawn = F.softplus(negatives - offset).masked_fill(~allowed, 0.0).sum(1) / allowed.sum(1).clamp_min(1)
    return (F.softplus(offset - positive) + count * drawn).mean()


class CRD(FeatureLoss):
    """Tell the teacher's embedding of a sample from those of other classes by the student's, and the reverse.

    Embeddings of student and teacher, projected and of length 1, are each compared with a memory bank of the other
    network's for all N samples of the data set; see :func:`crd`. The positive is, as in the authors' code, the bank's
    entry of the same sample, from the epoch before. Then the batch's own entries are moved to the new embeddings.
    τ divides the scores; it is no temperature of soft targets, and no schedule of temperatures changes it.

    Negatives are samples of another class, which needs labels, as in the authors' results; a sample counts as one of
    another class until it was seen once. Where the target is not one class for each sample (no labels, tokens, mixup),
    every other sample is a negative. Negatives are drawn once for a batch, not for each sample of it, by a generator
    that depends on ``seed`` and the step alone; where K ≥ N, all samples are taken in place of draws.

    The batches have to say which samples they hold: wrap the training set in :class:`kd_lightning.data.WithIds`.
    Memory, and each checkpoint, hold 2·N·feature_dim numbers more (51 MB for 50 000 samples). Under DDP all processes
    write all samples' embeddings to their banks; ``DDPStrategy(broadcast_buffers=False)`` saves sending the banks at
    each step.

    Args:
        student_layer: Of vectors, such as the last before the classifier; maps and tokens are averaged.
        teacher_layer: Likewise; the student's name unless given.
        feature_dim: Width of the embeddings.
        negatives: K.
        tau: τ > 0.
        momentum: Share of the old entry in a new one, in [0, 1).
        seed: Of the banks' first entries and of the negatives.
        weight: Factor of the term.

    Raises:
        ValueError: For batches that do not say which samples they hold, or that are of another data set than at first.
    """

    needs_sample_ids = True
    student_projector: nn.Module
    teacher_projector: nn.Module
    student_bank: Tensor
    teacher_bank: Tensor
    labels: Tensor
    log_z: Tensor
    step: Tensor

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | None = None,
        feature_dim: int = 128,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if not tau > 0:
            raise ValueError(f"expected tau > 0, got {tau}: the authors take 0.07")
        if feature_dim < 1 or negatives < 1:
            raise ValueError(f"expected feature_dim >= 1 and negatives >= 1, got {feature_dim} and {negatives}")
        if not 0 <= momentum < 1:
            raise ValueError(f"expected momentum in [0, 1), got {momentum}: at 1 the banks would never change")
        self.feature_dim, self.negatives, self.tau, self.momentum, self.seed = (
            feature_dim, negatives, tau, momentum, seed
        )  # fmt: skip

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        assert teacher is not None
        s, t = (embedding(x) for x in self.features(student, teacher))
        self.student_projector = nn.Linear(s.shape[1], self.feature_dim)
        self.teacher_projector = nn.Linear(t.shape[1], self.feature_dim)
        shape, random = (_samples(student).total, self.feature_dim), torch.Generator().manual_seed(self.seed)
        for name in ("student_bank", "teacher_bank"):
            # Of length 1 on average.
            first = (2 * torch.rand(shape, generator=random) - 1) / math.sqrt(self.feature_dim / 3)
            self.register_buffer(name, first)
        self.register_buffer("labels", torch.full(shape[:1], -1))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("step", torch.tensor(0))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor | None) -> Tensor:
        ids, step = self._ids(_samples(student)), int(self.step)
        target = target if target is not None and target.shape == ids.shape and not target.is_floating_point() else None
        labels = torch.full_like(ids, -1) if target is None else target
        s, t = self.features(student, teacher)
        s = F.normalize(project(self.student_projector, embedding(s)))
        t = F.normalize(project(self.teacher_projector, embedding(t.detach())))
        others = self._draw(len(self.labels), step).to(ids.device)
        known = (labels[:, None] >= 0) & (labels[:, None] == self.labels[others])
        allowed = (ids[:, None] != others) & ~known

        terms, normalizers = [], []
        for i, (anchor, bank) in enumerate(((s, self.teacher_bank), (t, self.student_bank))):
            # Copies: the banks change before the backward pass.
            positive = (anchor * bank[ids].to(anchor.dtype)).sum(1) / self.tau
            negative = anchor @ bank[others].to(anchor.dtype).T / self.tau
            log_z = self._normalizer(positive, negative, allowed) if step == 0 else self.log_z[i].clone()
            terms.append(crd(positive, negative, allowed, count=self.negatives, total=len(bank), log_z=log_z))
            normalizers.append(log_z)
        if self.training:
            self.log_z.copy_(torch.stack(normalizers))
            self._remember(ids, labels, s.detach(), t.detach())
        return torch.stack(terms).sum()

    def _ids(self, samples: Samples) -> Tensor:
        ids, total = samples.ids.to(self.labels.device), len(self.labels)
        if samples.total != total or bool(((ids < 0) | (ids >= total)).any()):
            raise ValueError(
                f"crd: sample ids {int(ids.min())} to {int(ids.max())} of {samples.total}, expected 0 to {total - 1} "
                f"of {total}, the samples of the data set that the training began with: wrap the whole training set "
                "in WithIds, and keep to it"
            )
        return ids

    def _draw(self, total: int, step: int) -> Tensor:
        if self.negatives >= total:
            return torch.arange(total)
        # Not the global generator: a resumed training and all processes have to draw the same.
        random = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        return torch.randint(total, (self.negatives,), generator=random)

    @torch.no_grad()
    def _normalizer(self, positive: Tensor, negatives: Tensor, allowed: Tensor) -> Tensor:
        """Return log Z: N times the mean of e^score over the batch's positives and K negatives each."""
        # So many of those that are there make K.
        share = (self.negatives / allowed.sum(1).clamp_min(1).to(positive.dtype)).log()
        sums = torch.logaddexp(positive, negatives.masked_fill(~allowed, -torch.inf).logsumexp(1) + share)
        if self.training:
            sums = all_gather(sums)
        return sums.logsumexp(0) + math.log(len(self.labels) / len(sums) / (self.negatives + 1))

    @torch.no_grad()
    def _remember(self, ids: Tensor, labels: Tensor, student: Tensor, teacher: Tensor) -> None:
        ids, labels, student, teacher = (all_gather(x) for x in (ids, labels, student, teacher))
        # Of a sample that a batch holds several times the first: which one is written last would be left to chance.
        order = ids.argsort(stable=True)
        repeated = ids[order].diff(prepend=ids.new_full((1,), -1)) == 0
        kept = order[~repeated]
        ids = ids[kept]
        self.labels[ids] = torch.where(labels[kept] >= 0, labels[kept], self.labels[ids])
        for bank, new in ((self.student_bank, student), (self.teacher_bank, teacher)):
            moved = self.momentum * bank[ids].to(new.dtype) + (1 - self.momentum) * new[kept]
            bank[ids] = F.normalize(moved).to(bank.dtype)
        self.step += 1


def _samples(student: Outputs) -> Samples:
    if student.samples is None:
        raise ValueError(
            "crd remembers samples, expected a batch that says which ones it holds: wrap the training set, "
            "DataLoader(kd_lightning.data.WithIds(dataset), ...)"
        )
    return student.samples
