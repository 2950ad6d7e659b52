"""The next token of a text, or the tokens that were taken out of it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection

from kd_lightning.headline import Headline
from kd_lightning.outputs import AnyOutputs, Outputs, TopK
from kd_lightning.tasks.batch import IGNORE_INDEX, Batch
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.metric import HeadlineMetric
from kd_lightning.tasks.token_classification import TokenClassification
from kd_lightning.tokens import read_tokenizer

_UNITS_OF_TEXT = ("character", "byte", "token")
_TOKENS = {"input_ids", "inputs_embeds"}
_SAME = 0.99


class LanguageModelling(TokenClassification):
    """The next token of each token of a text: logits (B, S, V), targets (B, S), -100 where none counts.

    Which token a label belongs to is the task's business. A batch (tokens, target) holds as the target of each place
    the token that comes after it. A mapping with ``input_ids`` is in Hugging Face's convention: ``labels`` stand at
    their own tokens' places, as a causal model of ``transformers`` shifts them inside itself; here they are shifted by
    one, so that all losses and figures see the next token. Without ``labels`` the tokens are their own labels. Places
    that ``attention_mask`` leaves out do not count, neither as the next token nor as the one that it comes after: what
    a model says after padding is no prediction. Targets that are the tokens themselves, or are shifted twice, are an
    error before the first step.

    The headline is the cross-entropy in bits per character: what it takes on average to write the test texts down with
    the model's help, −log₂ p of each token. Units are passages; the figure is the sum of their bits over the sum of
    their characters. Perplexity (2 to the power of the bits per token) and the share of tokens that are found are
    logged beside it.

    Args:
        per: Of what there are so many bits: ``character``, ``byte`` or ``token``. With tokens of several characters
            give ``tokenizer``.
        tokenizer: A file of Hugging Face's ``tokenizers`` library (``tokenizer.json``), which says how long tokens are;
            None where a token is what ``per`` says.
        shift: Whether labels stand at their own tokens' places, so that they have to be shifted: by default those of
            mappings do, unless the model is no causal one (``shift=False``: tokens that were masked, or those of a
            decoder with an encoder); the labels say then what counts.
        units: What is read as one, plural, as sentences say it.

    Raises:
        ValueError: For another ``per``.
    """

    def __init__(
        self, per: str = "token", tokenizer: str | None = None, shift: bool | None = None, units: str = "passages"
    ) -> None:
        super().__init__(class_dim=2, units=units)
        if per not in _UNITS_OF_TEXT:
            raise ValueError(f"expected per to be one of {', '.join(_UNITS_OF_TEXT)}, got {per!r}")
        self.per, self.shift, self.writes = per, shift, shift is not False
        self._lengths = None if tokenizer is None or per == "token" else _lengths(tokenizer, per)
        self.headline = Headline(
            name="cross-entropy",
            key=f"bits_per_{per}",
            units=units,
            higher_is_better=False,
            percent=False,
            symbol=f"bits per {per}",
            digits=3,
            of_mean=_ratio,
        )

    # What a batch means.

    def _read(self, batch: Any) -> Batch:
        read = super()._read(batch)
        if self.shift is False or not isinstance(batch, Mapping) or not _TOKENS & batch.keys():
            return read
        labels: Any = batch.get("input_ids") if read.target is None else read.target
        mask, counts = batch.get("attention_mask"), None
        if isinstance(labels, Tensor) and isinstance(mask, Tensor) and mask.shape == labels.shape:
            counts = mask != 0
            labels = labels.masked_fill(~counts, IGNORE_INDEX)
        target = labels if self.shift else _next(labels)
        return read._replace(target=target if counts is None else target.masked_fill(~counts, IGNORE_INDEX))

    def target_of(self, target: Any) -> Any:
        """Return the next tokens as int64; shifted first where ``shift`` says so."""
        target = super().target_of(target)
        return _next(target) if self.shift else target

    def check_batch(self, batch: Batch) -> None:
        """Raise ValueError for targets that are the tokens themselves, or the tokens after the next."""
        tokens = batch.kwargs.get("input_ids", next(iter(batch.args), None))
        if self.shift is False or not (isinstance(tokens, Tensor) and isinstance(batch.target, Tensor)):
            return
        place = place_of_labels(tokens.cpu(), batch.target.cpu())
        if place in (None, 1):
            return
        if place == 0:
            raise ValueError(
                "the targets are the tokens themselves, expected the next token of each: shift them in the data set, "
                "or pass task=LanguageModelling(shift=True) for labels at their own tokens' places"
            )
        raise ValueError(
            "the targets are the tokens after the next ones, expected the next token of each: labels in a mapping "
            "stand at their own tokens' places (Hugging Face's convention), and are shifted by the task; leave the "
            "shift to it, or pass a batch (tokens, next tokens)"
        )

    # What a good answer is.

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        """Return for each passage with a target its bits and its characters: (n, 2).

        Where only the best tokens are known, one that is not among them counts with all that these leave of 1: a bound.
        """
        labelled = self.has_label(target)
        counts = target[labelled] != IGNORE_INDEX
        labels = target[labelled].clamp_min(0)
        log_p = _log_p(outputs, labels, labelled)
        bits = -(log_p / math.log(2)).masked_fill(~counts, 0).sum(1)
        lengths = torch.ones_like(bits[:, None].expand(labels.shape)) if self._lengths is None else self._long(labels)
        return torch.stack([bits, lengths.masked_fill(~counts, 0).sum(1)], -1)

    def beside(self, student: Outputs, teacher: AnyOutputs, target: Tensor) -> dict[str, Tensor]:
        """Compare two models' distributions at each token that counts: (n,) by the keys of ``records.FIGURES``.

        ``kl_teacher`` is KL(teacher ‖ student) in bits a token. ``acceptance`` is Σ min(p_t, p_s): the probability with
        which speculative decoding accepts a token that the student has drafted (Leviathan et al., ICML 2023,
        https://arxiv.org/abs/2211.17192, corollary 3.6).
        """
        if isinstance(teacher, TopK) or not self.comparable(student, teacher):
            return {}
        counts = target != IGNORE_INDEX
        log_t, log_s = (torch.log_softmax(x.logits[counts].float(), -1) for x in (teacher, student))
        p_t = log_t.exp()
        kl = (p_t * (log_t - log_s)).sum(-1) / math.log(2)
        return {"kl_teacher": kl, "acceptance": torch.minimum(p_t, log_s.exp()).sum(-1)}

    def divergence(self, student: Outputs, teacher: AnyOutputs, target: Tensor | None) -> Tensor | None:
        """Return KL(teacher ‖ student) in bits for each token that counts: (n,)."""
        return None if target is None else self.beside(student, teacher, target).get("kl_teacher")

    def metrics(self) -> MetricCollection:
        perplexity = Headline(
            name="perplexity",
            key="perplexity",
            units=self.headline.units,
            higher_is_better=False,
            percent=False,
            of_mean=_perplexity,
        )
        return MetricCollection(
            {
                self.headline.key: HeadlineMetric(self),
                "perplexity": HeadlineMetric(_Tokens(perplexity)),
                "acc": HeadlineMetric(Classification()),
            },
            compute_groups=False,
        )

    def knows_nothing(self, target: Tensor, width: int | None = None) -> float | None:
        """Return the bits of a model that knows how frequent each token is, and no more; None for one token alone."""
        labels = target[target != IGNORE_INDEX]
        counts = labels.flatten().bincount()
        share = counts[counts > 0].double() / max(len(labels), 1)
        if len(share) < 2:
            return None
        bits = float(-(share * share.log2()).sum())
        return bits if self._lengths is None else bits * len(labels) / float(self._long(labels).sum())

    def one_answer(self) -> str:
        return "gives the same token everywhere"

    def _long(self, labels: Tensor) -> Tensor:
        assert self._lengths is not None
        return self._lengths.to(labels.device)[labels]


class _Tokens:
    """What perplexity is of: bits by token, whatever the headline's are of."""

    def __init__(self, headline: Headline) -> None:
        self.headline, self._task = headline, LanguageModelling()

    def scores(self, outputs: AnyOutputs, target: Tensor) -> Tensor:
        return self._task.scores(outputs, target)


def is_causal(network: Any) -> bool:
    """Tell whether a network is a causal language model of ``transformers``, or holds one, as an adapter does.

    Known by what these say of themselves: they generate text, and have no encoder. They shift labels inside.
    """
    config = _config_of_writer(network)
    return config is not None and not getattr(config, "is_encoder_decoder", False)


def is_encoder_decoder(network: Any) -> bool:
    """Tell whether a network writes text with an encoder and a decoder of ``transformers``, such as T5."""
    return bool(getattr(_config_of_writer(network), "is_encoder_decoder", False))


def place_of_labels(tokens: Tensor, target: Tensor) -> int | None:
    """Tell how far ahead of its place each label stands in the text: 0, 1 or 2; None where that cannot be told.

    1 where several would do, as in a text of one token.

    Args:
        tokens: (B, S).
        target: (B, S), -100 where none counts.
    """
    if tokens.shape != target.shape or tokens.ndim != 2 or tokens.shape[1] < 3:
        return None
    for ahead in (1, 0, 2):
        there, labels = tokens[:, ahead:], target[:, : tokens.shape[1] - ahead]
        counts = labels != IGNORE_INDEX
        if counts.any() and float((there == labels)[counts].double().mean()) >= _SAME:
            return ahead
    return None


def _config_of_writer(network: Any) -> Any:
    """Return the configuration of the outermost model of ``transformers`` if that writes text, else None."""
    for module in network.modules():
        can_generate, config = getattr(module, "can_generate", None), getattr(module, "config", None)
        if callable(can_generate) and config is not None:
            return config if can_generate() else None
    return None


def _next(labels: Any) -> Any:
    """Put at each place the label of the next one; -100 at the last."""
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return labels
    shifted = labels.roll(-1, 1)
    shifted[:, -1] = IGNORE_INDEX
    return shifted


def _log_p(outputs: AnyOutputs, labels: Tensor, labelled: Tensor) -> Tensor:
    """Return log p of the labels: (n, S)."""
    if not isinstance(outputs, TopK):
        log_p = torch.log_softmax(outputs.logits[labelled].float(), -1)
        return log_p.gather(-1, labels[..., None]).squeeze(-1)
    indices, log_probs = outputs.indices[labelled], outputs.log_probs[labelled].float()
    known = (indices == labels[..., None]) & log_probs.isfinite()
    rest = (1 - log_probs.exp().sum(-1)).clamp_min(1e-6).log()
    return torch.where(known.any(-1), log_probs.masked_fill(~known, -math.inf).amax(-1), rest)


def _lengths(tokenizer: str, per: str) -> Tensor:
    """Return how many characters or bytes each token stands for."""
    return torch.from_numpy(read_tokenizer(tokenizer).lengths(per)).float()


def _ratio(mean: NDArray[np.float64]) -> float:
    return float(mean[0] / mean[1])


def _perplexity(mean: NDArray[np.float64]) -> float:
    return float(2 ** min(_ratio(mean), 1000.0))
