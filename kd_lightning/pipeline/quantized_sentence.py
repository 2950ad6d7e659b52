"""What quantising cost, whether training for it helped, and what distilling and quantising bring together: in words."""

from collections.abc import Mapping

from kd_lightning.pipeline.chance import AT_CHANCE, ONE_CLASS
from kd_lightning.pipeline.results import Model
from kd_lightning.pipeline.sentence import number, percent, stated, within
from kd_lightning.pipeline.statistics import Interval


def quantized_sentence(
    models: Mapping[str, Model], differences: Mapping[str, Interval], ptq: str | None, qat: str | None
) -> list[str]:
    """Return sentences without full stops; with one seed, nothing of what training again may turn round.

    Args:
        models: by key.
        differences: of accuracy, those of :class:`~kd_lightning.pipeline.results.Verdict`.
        ptq: key of the distilled student after post-training quantisation.
        qat: key of the one after quantisation-aware training.
    """
    parts = []
    key = ptq or qat
    if key is not None:
        bits, costs = bits_of(models[key]), []
        trained_again = qat is not None and len(models[qat].seeds) > 1
        if "ptq-distilled" in differences:
            costs.append(_cost("post-training quantisation", differences["ptq-distilled"], "the distilled student"))
        if "qat-continued" in differences and trained_again:
            costs.append(_cost("quantisation-aware training", differences["qat-continued"], "the same further steps"))
        if costs:
            parts.append(f"In {bits}, {'; '.join(costs)}")
        parts += _training(differences) if trained_again else []
        parts += _against_float(models, key)
        parts += _together(models, ptq, qat)
    for name, model in models.items():
        if model.quantized is not None:
            source = models.get(model.quantized.source)
            said = (f"it {AT_CHANCE}", f"it {ONE_CLASS}") if source is not None and source.learned_nothing else ()
            warnings = [warning for warning in model.quantized.warnings if not warning.startswith(said)]
            parts += [f"Beware of {name!r}: {warning}" for warning in warnings]
    return parts


def bits_of(model: Model) -> str:
    """Say it as people do: ``int8``, ``4-bit weights``, ``4-bit weights and 8-bit activations``."""
    assert model.quantized is not None
    weights, activations = model.quantized.weight_bits, model.quantized.activation_bits
    if weights == activations == 8:
        return "int8"
    return f"{weights}-bit weights" + ("" if activations is None else f" and {activations}-bit activations")


def _cost(how: str, difference: Interval, of: str) -> str:
    if difference.high < 0:
        return f"{how} lost {stated(-difference)} against {of} in fp32"
    if difference.low > 0:
        return f"{how} is {stated(difference)} better than {of} in fp32"
    return f"that {how} lost anything against {of} in fp32 was not shown (a difference of {within(difference)})"


def _training(differences: Mapping[str, Interval]) -> list[str]:
    """Whether quantisation-aware training beat post-training quantisation, and whether that was the training alone."""
    gain, beyond = differences.get("qat-ptq"), differences.get("qat-ptq beyond the steps")
    if gain is None:
        return []
    if gain.high < 0:
        return [f"Quantisation-aware training is {stated(-gain)} worse than post-training quantisation: leave it out"]
    if gain.low <= 0:
        return [
            "That quantisation-aware training is better than post-training quantisation was not shown "
            f"(a difference of {within(gain)}): post-training quantisation is enough here"
        ]
    text = f"Quantisation-aware training is {stated(gain)} better than post-training quantisation"
    if beyond is not None and beyond.low > 0:
        text += f", {stated(beyond)} beyond what the same further steps bring in fp32"
    elif beyond is not None:
        text += f"; that it is more than the same further steps bring in fp32 was not shown (by {within(beyond)})"
    return [text]


def _against_float(models: Mapping[str, Model], key: str) -> list[str]:
    """What the bits alone bring: on a small network, converting to integers and back may take longer than it saves."""
    model = models[key]
    assert model.quantized is not None
    source = models.get(model.quantized.source)
    pairs = (
        [] if source is None else [(model.latency, source.latency), (model.latency_openvino, source.latency_openvino)]
    )
    found = [
        f"{times(slow.p50_ms / fast.p50_ms, 'faster', 'slower')} at batch 1 and "
        f"{times(fast.throughput_per_s / slow.throughput_per_s, 'faster', 'slower')} at batch 64 in {fast.runtime}"
        for fast, slow in pairs
        if fast is not None and slow is not None and fast.runtime == slow.runtime
    ]
    if source is not None and source.file_mb and model.file_mb:
        found.insert(0, times(source.file_mb / model.file_mb, "smaller", "larger"))
    processor = next((f" (on {fast.processor})" for fast, _ in pairs if fast is not None and fast.processor), "")
    return [f"Against its own file in fp32 it ({key}) is {', '.join(found)}{processor}"] if found else []


def times(ratio: float, more: str, less: str) -> str:
    """Say a ratio: ``1.5 times slower`` for 0.67."""
    if 0.95 < ratio < 1.05:
        return f"not {more}"
    return f"{number(max(ratio, 1 / ratio), '.1f')} times {more if ratio >= 1 else less}"


def _together(models: Mapping[str, Model], ptq: str | None, qat: str | None) -> list[str]:
    """Compare the sum of both with the teacher; validation says which of the two, and the simpler one wins a tie."""
    teacher = models.get("teacher")
    candidates = [key for key in (ptq, qat) if key is not None]
    if teacher is None or not candidates:
        return []
    key = max(candidates, key=lambda name: models[name].val_accuracy)
    model, gains = models[key], []
    if teacher.file_mb and model.file_mb:
        gains.append(times(teacher.file_mb / model.file_mb, "smaller", "larger"))
    fast, slow = model.latency, teacher.latency
    if fast is not None and slow is not None and fast.runtime == slow.runtime:
        gains.append(f"{times(slow.p50_ms / fast.p50_ms, 'faster', 'slower')} at batch 1 in {fast.runtime}")
    if not gains:
        return []
    right = f"{percent(model.accuracy)} % of the test images right against {percent(teacher.accuracy)} %"
    return [f"Distilled and quantised ({key}), it is {' and '.join(gains)} than the teacher in fp32, with {right}"]
