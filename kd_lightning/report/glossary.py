"""The words of a report for who meets them for the first time: those that stand in it."""

from collections.abc import Iterable, Mapping
from typing import Any

_ROLES = {
    "teacher": "the large network, whose answers the student learns from",
    "assistant": "a network between teacher and student in size: taught by the one, it teaches the other",
    "student": "the small network, trained on the labels: what one has without a teacher",
    "control": "the same small network, trained on the class that the teacher finds most likely, without its "
    "probabilities: what softness is compared with",
    "distilled": "the same small network, trained on all that the teacher answers",
    "continued": "the distilled student after as many further steps as quantisation-aware training took: what that is "
    "compared with",
}
_TITLES = {"student": "student alone", "control": "teacher's hard labels", "continued": "distilled, further steps"}


def glossary(models: Iterable[Mapping[str, Any]], verdict: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return words with their meaning.

    Args:
        models: Of the verdict.
        verdict: As ``verdict.json`` has it.
    """
    models = list(models)
    roles = {model["role"] for model in models}
    found = [(_TITLES.get(role, role), meaning) for role, meaning in _ROLES.items() if role in roles]
    if any(model.get("temperature") is not None for model in models):
        found.append(
            ("T", "the temperature, by which outputs are divided before they become probabilities; 1 when served")
        )
    if any(model.get("gap_closed") is not None for model in models):
        found.append(("gap closed", "how far from the student alone, 0 %, to the teacher, 100 %"))
    quantized = [model["quantized"] for model in models if model.get("quantized")]
    bits = {(one["weight_bits"], one["activation_bits"]) for one in quantized}
    if (8, 8) in bits:
        found.append(("int8", "numbers of 8 bits in place of 32 (fp32): a smaller file, faster where the processor is"))
    if any(activations is None for _, activations in bits):
        found.append(("4-bit weights", "weights of few bits alone; the computation stays in fp32"))
    if any(not one["training"] for one in quantized):
        found.append(("PTQ", "post-training quantisation: the ranges are found on some samples, nothing is trained"))
    if any(one["training"] for one in quantized):
        found.append(("QAT", "quantisation-aware training: some further steps in which the network meets the rounding"))
    if quantized or verdict.get("runtime"):
        found.append(("ONNX Runtime, OpenVINO", "programs that serve the exported file, and the PyTorch it replaces"))
    return found
